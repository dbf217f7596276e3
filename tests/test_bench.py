"""The bench measures what it says: wrong providers are not timed, memory is seen, results can be read again."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import bench_sigmoid, report
from bench.cases import Case, Provider, make_data
from bench.claims import Claim
from bench.measure import COPY, errors, measure_time
from bench.memory import extra_peak_bytes
from bench.results import Results

CPU = torch.device("cpu")
TIME = Case("sigmoid", "focal", (3, 50), torch.float32, torch.uint8, upstream=0.5)
MEMORY = Case("memory", "bce", (64, 1000), torch.float32, torch.float32)


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


def test_errors_are_relative_and_found_in_any_block_of_rows(monkeypatch):
    monkeypatch.setattr("bench.measure._ORACLE_ELEMENTS", 50)
    x, y = make_data(TIME, CPU)
    loss = bench_sigmoid.oracle("focal", x.double(), y.double()).mean()
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(TIME.upstream, dtype=torch.float64))
    worst = grad.abs().max()
    grad[-1, -1] += 0.01 * worst
    loss_error, grad_error = errors(TIME, bench_sigmoid.oracle, x.detach(), y, loss.detach() * 1.001, grad)
    assert loss_error == pytest.approx(1e-3, rel=1e-3)
    assert grad_error == pytest.approx(1e-2, rel=1e-2)


def test_memory_of_a_known_allocation_is_seen():
    size = 64 << 20

    def temporary():
        torch.ones(size, dtype=torch.uint8)

    temporary()
    assert extra_peak_bytes(temporary, CPU) == pytest.approx(size, rel=0.05)
    assert extra_peak_bytes(lambda: None, CPU) < size / 50


def test_a_run_is_kept_shown_and_read_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_sigmoid, "_CPU_CASES", (TIME, MEMORY))
    claims = (
        Claim("{}, times as fast", TIME, "eager", "pytorch", at_least=1e-6),
        Claim("{}, memory", MEMORY, "eager", at_most=1e-6),
    )
    monkeypatch.setattr(bench_sigmoid, "_CPU_CLAIMS", claims)
    monkeypatch.setattr(command, "_QUICK_BUDGET", 0.0)
    assert command.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "NOT MET" in shown
    assert "left out by --quick" in shown

    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert [verdict["met"] for verdict in content["claims"]] == [True, False]
    states = {(row["case"]["suite"], row["provider"]): row["status"] for row in content["rows"]}
    assert states["sigmoid", "eager"] == states["memory", "pytorch"] == "ok"
    assert states["sigmoid", "triton"] == "skipped", "the interpreter is not timed"
    assert str(tmp_path) not in path.read_text()

    run = Results.load(path)
    assert {row.case for row in run.rows} == {TIME, MEMORY}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- written by make bench -->\nold\n<!-- end -->\nafter\n")
    report.write_docs(tmp_path, tmp_path / "page.md", readme)
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith("<!-- end -->\nafter\n")
    assert TIME.title in (tmp_path / "page.md").read_text()
