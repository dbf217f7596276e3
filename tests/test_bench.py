"""The bench measures what it says: wrong providers are not timed, memory is seen, results can be read again."""

import json
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import bench_head, bench_sigmoid, bench_softmax, families, report, xmc
from bench.cases import Case, OfLayer, Provider, Row, as_tensor, make_data
from bench.claims import Claim
from bench.measure import COPY, errors, measure_time
from bench.memory import extra_peak_bytes
from bench.results import Results
from bertloss_fast.targets import SparseLabels

CPU = torch.device("cpu")
TIME = Case("sigmoid", "focal", (3, 50), torch.float32, torch.uint8, upstream=0.5)
CLASSES = Case("softmax", "softmax focal", (30, 7), torch.float32, torch.int64, upstream=0.5, targets="classes")
TEACHER = Case("softmax", "distillation", (30, 7), torch.bfloat16, torch.bfloat16, targets="teacher")
MEMORY = Case("memory", "bce", (64, 1000), torch.float32, torch.float32)
SPARSE = Case("sigmoid", "focal", (300, 7), torch.bfloat16, None, labels_per_row=5)
SPARSE_MEMORY = Case("memory", "focal", (64, 1000), torch.float32, None, labels_per_row=5)


def _provider(name, loss):
    return Provider(name, {"focal": (name, loss)}, ours=True)


def _nan_gradient(x, y):
    return bench_sigmoid.torchvision_focal(x, y) + (x * 0).sqrt().sum() * 0


WRONG = {
    "another reduction": lambda x, y: bench_sigmoid.torchvision_focal(x, y) * x.numel(),
    "wrong gradient": lambda x, y: bench_sigmoid.torchvision_focal(x, y).detach() + (x - x.detach()).sum(),
    "NaN in the gradient": _nan_gradient,
    "no gradient": lambda x, y: bench_sigmoid.torchvision_focal(x.detach().requires_grad_(), y),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_marked_and_not_timed(name):
    right = _provider("right", bench_sigmoid.torchvision_focal)
    rows = measure_time(TIME, [right, _provider("wrong", WRONG[name])], bench_sigmoid.oracle, CPU, 0.0)
    by_name = {row.provider: row for row in rows}
    assert by_name["wrong"].status == "wrong"
    assert by_name["wrong"].seconds is None
    assert by_name["right"].status == by_name[COPY].status == "ok"
    assert by_name["right"].seconds.median > 0


def test_a_provider_that_raises_leaves_the_others_alone():
    def fails(x, y):
        raise RuntimeError("no room in /some/private/place")

    right = _provider("right", bench_sigmoid.torchvision_focal)
    failed, timed, _ = measure_time(TIME, [_provider("fails", fails), right], bench_sigmoid.oracle, CPU, 0.0)
    assert (failed.status, failed.note) == ("failed", "RuntimeError: no room in place")
    assert timed.seconds is not None


@pytest.mark.parametrize("case", [TIME, replace(TIME, target_dtype=None)], ids=["dense", "sparse"])
def test_errors_are_relative_and_found_in_any_block_of_rows(monkeypatch, case):
    monkeypatch.setattr("bench.measure._ORACLE_ELEMENTS", 50)
    x, y = make_data(case, CPU)
    loss = bench_sigmoid.oracle("focal", x.double(), as_tensor(y).double()).mean()
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(case.upstream, dtype=torch.float64))
    worst = grad.abs().max()
    grad[-1, -1] += 0.01 * worst
    loss_error, grad_error = errors(case, bench_sigmoid.oracle, x, y, loss.detach() * 1.001, [grad])
    assert loss_error == pytest.approx(1e-3, rel=1e-3)
    assert grad_error == pytest.approx(1e-2, rel=1e-2)


def test_sparse_and_dense_targets_hold_the_same_labels():
    x, labels = make_data(SPARSE, CPU)
    assert isinstance(labels, SparseLabels)
    assert (labels.to_dense().sum(1) == 5).all()
    twin_x, twin = make_data(replace(SPARSE, target_dtype=torch.bfloat16), CPU)
    assert twin.dtype == torch.bfloat16
    assert torch.equal(x, twin_x)
    assert torch.equal(labels.to_dense(twin.dtype), twin)
    assert labels.to_dense().any(0).all(), "some label is never drawn"


def test_the_floor_of_sparse_labels_is_that_of_the_logits():
    assert SPARSE.floor_bytes == 4 * SPARSE.numel
    assert replace(SPARSE, target_dtype=torch.uint8).floor_bytes == 5 * SPARSE.numel


def test_peers_are_given_sparse_labels_as_bytes():
    def peer(x, y):
        assert y.dtype == torch.uint8
        return bench_sigmoid.torchvision_focal(x, y)

    ours = bench_sigmoid.PROVIDERS[1]
    rows = measure_time(SPARSE, [ours, _provider("peer", peer)._replace(ours=False)], bench_sigmoid.oracle, CPU, 0.0)
    assert [row.status for row in rows] == ["ok"] * 3
    assert [row.label for row in rows] == ["bertloss-fast, eager", "peer, dense uint8 targets", COPY]


def test_a_claim_on_memory_counts_what_comes_on_top_of_the_gradient():
    row = Row(MEMORY, "eager", "", peak_bytes=MEMORY.logits_bytes + (3 << 20))
    assert Claim("", MEMORY, "eager", at_most=4, over_gradient=True).measured([row]) == 3


@pytest.mark.parametrize("case", [*bench_sigmoid.cases(CPU), *bench_sigmoid.cases(torch.device("cuda"))], ids=str)
def test_a_case_is_read_as_it_was_written(case):
    fields = json.loads(json.dumps(case.to_json()))
    assert Case.from_json(fields) == case
    if case.labels_per_row is None:
        del fields["labels_per_row"]  # as in older results
        assert Case.from_json(fields) == case


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_claim_is_about_a_case(device):
    device = torch.device(device)
    assert {claim.case for claim in families.claims(device)} <= set(families.cases(device))


@pytest.mark.parametrize("case", [CLASSES, TEACHER, replace(CLASSES, loss="cross-entropy")])
def test_losses_of_rows_are_checked_against_float64(case):
    """As a mean over rows, ours and PyTorch's formula alike."""
    family = families.family_of(case)
    providers = [provider for provider in family.PROVIDERS if provider.name in ("eager", "pytorch")]
    rows = measure_time(case, providers, family.oracle, CPU, 0.0)
    assert [row.status for row in rows] == ["ok"] * 3
    assert all(row.grad_error < 0.01 for row in rows[:2])
    assert Case.from_json(case.to_json()) == case


def test_memory_of_a_known_allocation_is_seen():
    size = 64 << 20

    def temporary():
        torch.ones(size, dtype=torch.uint8)

    temporary()
    assert extra_peak_bytes(temporary, CPU) == pytest.approx(size, rel=0.05)
    assert extra_peak_bytes(lambda: None, CPU) < size / 50


def test_a_run_is_kept_shown_and_read_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_sigmoid, "_CPU_CASES", (TIME, MEMORY, SPARSE_MEMORY))
    claims = (
        Claim("{}, times as fast", TIME, "eager", "pytorch", at_least=1e-6),
        Claim("{}, memory", MEMORY, "eager", at_most=1e-6),
        Claim("{}, memory", SPARSE_MEMORY, "eager", at_most=64, over_gradient=True),
    )
    monkeypatch.setattr(bench_sigmoid, "_CPU_CLAIMS", claims)
    monkeypatch.setattr(bench_softmax, "_CPU_CASES", (CLASSES,))
    for family in (bench_softmax, bench_head):
        monkeypatch.setattr(family, "_CPU_CLAIMS", ())
    monkeypatch.setattr(command, "_QUICK_BUDGET", 0.0)
    assert command.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "NOT MET" in shown
    assert "left out by --quick" in shown

    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert [verdict["met"] for verdict in content["claims"]] == [True, False, True]
    states = {(row["case"]["suite"], row["provider"]): row["status"] for row in content["rows"]}
    assert states["sigmoid", "eager"] == states["memory", "pytorch"] == "ok"
    assert states["sigmoid", "triton"] == "skipped", "the interpreter is not timed"
    assert str(tmp_path) not in path.read_text()

    run = Results.load(path)
    assert {row.case for row in run.rows} == {TIME, MEMORY, SPARSE_MEMORY}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- written by make bench -->\nold\n<!-- end -->\nafter\n")
    report.write_docs(tmp_path, tmp_path / "page.md", readme)
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith("<!-- end -->\nafter\n")
    assert TIME.title in (tmp_path / "page.md").read_text()


def test_a_case_of_a_layer_comes_back_from_json():
    case = bench_head.cases(CPU)[0]
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert "256 x 384 x 131072" in case.title


def test_gradients_of_a_layer_are_checked_too():
    """A provider whose weight's gradient alone is wrong is found."""
    case = Case("head", "linear focal", (6, 50), torch.float32, None, labels_per_row=2, features=4)
    right = bench_head.PROVIDERS[1].losses["linear focal"][1]

    def halved(x, y):
        return right(x, OfLayer(0.5 * y.weight + 0.5 * y.weight.detach(), y.targets))

    wrong = Provider("halved", {"linear focal": ("halved", halved)}, ours=True)
    rows = measure_time(case, [bench_head.PROVIDERS[1], wrong], bench_head.oracle, CPU, 0.01)
    assert [row.status for row in rows] == ["ok", "wrong"]
    assert rows[0].seconds is not None
    assert rows[1].seconds is None


def test_a_step_with_many_labels(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.xmc._STEPS", 1)
    monkeypatch.setattr("bench.xmc._LENGTH", 4)
    sizes = ["--labels", "500", "--rows", "2", "--layers", "1", "--features", "64"]
    assert xmc.main(["--device", "cpu", "--out", str(tmp_path), *sizes]) == 0
    (step,) = json.loads((tmp_path / "xmc.json").read_text())["steps"]
    assert step["labels"] == 500
    assert step["head_ms"] > 0
