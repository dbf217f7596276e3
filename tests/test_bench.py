"""The bench measures what it says: wrong providers are not timed, tails and memory are seen."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bench import bench_head, bench_sigmoid, bench_softmax, families, xmc
from bench.cap import capped
from bench.cases import Case, Provider
from bench.check import Expected, Tails
from bench.data import OfLayer, as_tensor, make_data
from bench.measure import COPY, interleave, measure_time
from bench.memory import extra_peak_bytes
from bertloss_fast.targets import SparseLabels

CPU = torch.device("cpu")
TIME = Case("sigmoid", "focal", (3, 50), torch.float32, torch.uint8, upstream=0.5)
CLASSES = Case("softmax", "softmax focal", (30, 7), torch.float32, torch.int64, upstream=0.5, targets="classes")
TEACHER = Case("softmax", "distillation", (30, 7), torch.bfloat16, torch.bfloat16, targets="teacher")
SPARSE = Case("sigmoid", "focal", (300, 7), torch.bfloat16, None, labels_per_row=5)


def _provider(name, loss):
    return Provider(name, {"focal": (name, loss)}, ours=True, sparse=True)


def _nan_gradient(x, y):
    return bench_sigmoid.formula_of_focal(x, y) + (x * 0).sqrt().sum() * 0


WRONG = {
    "another reduction": lambda x, y: bench_sigmoid.formula_of_focal(x, y) * x.numel(),
    "wrong gradient": lambda x, y: bench_sigmoid.formula_of_focal(x, y).detach() + (x - x.detach()).sum(),
    "NaN in the gradient": _nan_gradient,
    "another sign": lambda x, y: -bench_sigmoid.formula_of_focal(x, y),
    "no gradient": lambda x, y: bench_sigmoid.formula_of_focal(x.detach().requires_grad_(), y),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_marked_and_not_timed(name):
    right = _provider("right", bench_sigmoid.formula_of_focal)
    rows = measure_time(TIME, [right, _provider("wrong", WRONG[name])], bench_sigmoid.oracle, CPU, 0.0)
    by_name = {row.provider: row for row in rows}
    assert by_name["wrong"].status == "wrong"
    assert by_name["wrong"].seconds is None
    assert by_name["right"].status == by_name[COPY].status == "ok"
    assert by_name["right"].seconds.median > 0


def test_the_tails_tell_what_is_lost_there():
    """Of loss and gradient: both of the naive formula's are gone at 20; one that is off by a thousandth says so."""
    tails = Tails(TIME, bench_sigmoid.oracle, CPU)
    ours = bench_sigmoid.PROVIDERS[1].losses["focal"][1]
    assert tails.error(ours, sparse=True) < 1e-5
    assert tails.error(bench_sigmoid.formula_of_focal, sparse=False) == pytest.approx(1)
    assert tails.error(lambda x, y: 1.001 * ours(x, y), sparse=True) == pytest.approx(1e-3, rel=0.01)
    assert math.isnan(tails.error(_nan_gradient, sparse=False))
    only_loss = Tails(replace(TIME, backward=False), bench_sigmoid.oracle, CPU)
    assert only_loss.error(lambda x, y: 1.001 * ours(x, y), sparse=True) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("case", [CLASSES, replace(CLASSES, loss="cross-entropy")])
def test_the_tails_of_rows(case):
    """Against what a sure row's loss is: C - 1 times e to the minus margin, which torch's own kernel rounds to zero."""
    losses = {p.name: p.losses[case.loss][1] for p in bench_softmax.PROVIDERS if p.name in ("eager", "pytorch")}
    tails = Tails(case, bench_softmax.oracle, CPU)
    assert tails.error(losses["pytorch"], sparse=False) == pytest.approx(1)
    right = (7 - 1) * torch.tensor([20.0, 40.0, 60.0, 80.0], dtype=torch.float64).neg().exp()
    x = torch.zeros(4, 7, dtype=torch.float64)
    x[:, 3] = torch.tensor([20.0, 40.0, 60.0, 80.0])
    found = bench_softmax.oracle("cross-entropy", x, torch.full((4,), 3))
    torch.testing.assert_close(found, torch.log1p(right), rtol=1e-9, atol=0)


def test_a_slow_provider_gets_fewer_turns_and_all_get_some():
    seconds = {"slow": 0.3, "quick": 0.001}
    calls = dict.fromkeys(seconds, 0)

    def sample(run, count):
        run()
        return seconds[run.__name__]

    def runs(name):
        def run():
            calls[name] += 1

        run.__name__ = name
        return run

    times = interleave({name: runs(name) for name in seconds}, sample, budget=0.0)
    assert len(times["slow"]) == 3
    assert len(times["quick"]) == 9


def test_a_first_call_that_lasts_is_stopped_and_the_case_goes_on(monkeypatch):
    monkeypatch.setattr("bench.check.FIRST_CALL_SECONDS", 1.0)

    def compiles_forever(x, y):
        try:
            while True:
                x.exp()
        except TimeoutError as error:
            raise RuntimeError("the compiler failed") from error

    providers = [_provider("compiled", compiles_forever), _provider("right", bench_sigmoid.formula_of_focal)]
    stopped, right, _ = measure_time(TIME, providers, bench_sigmoid.oracle, CPU, 0.0)
    assert (stopped.status, stopped.note) == ("skipped", "first call: stopped after 1 s")
    assert right.seconds is not None
    with pytest.raises(ValueError, match="other"), capped(10):
        raise ValueError("other")


def test_a_stop_that_python_drops_is_made_again(monkeypatch):
    """As when the time is up while garbage is collected: what is raised in a finalizer is printed and forgotten."""
    monkeypatch.setattr("bench.cap._AGAIN", 0.1)
    dropped = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: dropped.append(what.exc_type))

    def for_ever(*arguments):
        while True:
            pass

    def twice():
        type("Finalized", (), {"__del__": for_ever})()
        for_ever()

    with pytest.raises(TimeoutError, match=r"stopped after 0.1 s"), capped(0.1):
        twice()
    assert dropped == [TimeoutError]


def test_a_provider_that_raises_leaves_the_others_alone():
    def fails(x, y):
        raise RuntimeError("no room in /some/private/place")

    right = _provider("right", bench_sigmoid.formula_of_focal)
    failed, timed, _ = measure_time(TIME, [_provider("fails", fails), right], bench_sigmoid.oracle, CPU, 0.0)
    assert (failed.status, failed.note) == ("failed", "RuntimeError: no room in place")
    assert timed.seconds is not None


@pytest.mark.parametrize("case", [TIME, replace(TIME, target_dtype=None)], ids=["dense", "sparse"])
def test_errors_are_relative_and_found_in_any_block_of_rows(monkeypatch, case):
    monkeypatch.setattr("bench.check._BLOCK", 50)
    x, y = make_data(case, CPU)
    loss = bench_sigmoid.oracle("focal", x.double(), as_tensor(y).double()).mean()
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(case.upstream, dtype=torch.float64))
    worst = grad.abs().max()
    grad[-1, -1] += 0.01 * worst
    loss_error, grad_error = Expected(case, bench_sigmoid.oracle, x, y).errors(loss.detach() * 1.001, [grad])
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
        return bench_sigmoid.formula_of_focal(x, y)

    ours = bench_sigmoid.PROVIDERS[1]
    rows = measure_time(
        SPARSE, [ours, _provider("peer", peer)._replace(ours=False, sparse=False)], bench_sigmoid.oracle, CPU, 0.0
    )
    assert [row.status for row in rows] == ["ok"] * 3
    assert [row.label for row in rows] == ["bertloss-fast, eager", "peer, dense uint8 targets", COPY]


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
    """Also where malloc keeps the memory that was freed for the next that asks."""
    size = 24 << 20  # left alone, malloc would ask the system for it once, and serve every later call from that

    def temporary():
        torch.ones(size, dtype=torch.int8)

    temporary()
    for _ in range(3):
        assert extra_peak_bytes(temporary, CPU) == pytest.approx(size, rel=0.2)
    assert extra_peak_bytes(lambda: None, CPU) < size / 5


def test_gradients_of_a_layer_are_checked_too():
    """A provider whose weight's gradient alone is wrong is found."""
    case = Case("head", "linear focal", (6, 50), torch.float32, None, labels_per_row=2, features=4)
    right = bench_head.PROVIDERS[1].losses["linear focal"][1]

    def halved(x, y):
        return right(x, OfLayer(0.5 * y.weight + 0.5 * y.weight.detach(), y.targets))

    wrong = Provider("halved", {"linear focal": ("halved", halved)}, ours=True, sparse=True)
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
