"""What the bench makes of its measurements: files that can be read again, tables, charts and claims."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_runs import CLASSES, CPU, MEMORY, SPARSE_MEMORY, TIME, run_of

from bench import __main__ as command
from bench import (
    bench_head,
    bench_listwise,
    bench_sigmoid,
    bench_softmax,
    charts,
    check,
    families,
    peers,
    report,
    run,
    single,
)
from bench.cases import ALONE, EVERYONE, Case, Row
from bench.claims import Claim
from bench.measure import COPY, measure_again, measure_time
from bench.results import Results


def test_a_run_ends_in_time_with_what_it_did_not_reach_named(capsys):
    assert command.main(["--device", "cpu", "--suite", "small", "--minutes", "1e-9"]) == 0
    shown = capsys.readouterr().out
    assert "the run's time was over" in shown
    assert "claims" not in shown


@pytest.fixture
def processes(monkeypatch):
    """A run of focal, which takes 2 seconds, BCE, which takes 1, and memory; what it did in which order.

    In the first process ``slow`` is what is measured, in the second ``quick``, but of BCE the other way round.
    """
    quick, slow = {"eager": 1.0, "pytorch": 4.0, COPY: 1.0}, {"eager": 2.0, "pytorch": 3.0, COPY: 1.0}
    visits, clock = [], [0.0]

    def rows_of(case, visit):
        visits.append((case.loss, visit))
        clock[0] += 2 if case.loss == "focal" else 1
        return run_of(case, **(quick if (case.loss == "focal") == (visit == 2) else slow)).rows

    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "_estimate", lambda *others: 0)
    monkeypatch.setattr(run, "run_case", lambda case, *others: rows_of(case, 1))
    monkeypatch.setattr(single, "_in_a_process", lambda left_out, function, rows, *others: rows_of(rows[0].case, 2))

    def measure(end=math.inf):
        results = Results({"quick": False})
        run.measure_all(results, [TIME, replace(TIME, loss="bce"), MEMORY], CPU, frozenset(), end, None)
        times = [{row.provider: row.seconds.median for row in results.rows if row.case.loss == "focal"}]
        times.append(
            {row.provider: row.seconds.median for row in results.rows if row.case == replace(TIME, loss="bce")}
        )
        return visits, [{(1.0, 4.0): "quick", (2.0, 3.0): "slow"}[t["eager"], t["pytorch"]] for t in times]

    return measure


FIRST = [("focal", 1), ("bce", 1), ("bce", 1)]


@pytest.mark.parametrize(
    ("end", "second", "kept"),
    [
        (math.inf, [("bce", 2), ("focal", 2)], ["quick", "quick"]),
        (6.0, [("bce", 2)], ["slow", "quick"]),
        (4.5, [], ["slow", "quick"]),
    ],
    ids=["with time", "for one", "for none"],
)
def test_the_quicker_process_counts_and_the_shortest_case_has_its_second_first(processes, end, second, kept, capsys):
    assert processes(end) == (FIRST + second, kept)
    assert capsys.readouterr().out.count(TIME.title) == (2 if kept[0] == "quick" else 1)


def test_a_second_process_that_ends_leaves_what_the_first_measured(processes, monkeypatch):
    def end(*others):
        raise BrokenProcessPool

    monkeypatch.setattr(single, "_in_a_process", end)
    assert processes() == (FIRST, ["slow", "quick"])


def test_a_run_that_is_interrupted_says_where_its_figures_are(monkeypatch, tmp_path, capsys):
    def stop(case, *others):
        if case.loss != "focal":
            raise KeyboardInterrupt
        return run_of(case, eager=1.0).rows

    monkeypatch.setattr(run, "run_case", stop)
    assert command.main(["--device", "cpu", "--suite", "small", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().out
    assert [row.seconds.median for row in Results.load(path).rows] == [1.0]


def test_results_go_to_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as raised:
        command.main(["--out", str(tmp_path / "file")])
    assert raised.value.code == 2
    assert "--out: expected a folder, got the file" in capsys.readouterr().err


def test_what_is_timed_again_is_what_was():
    case = replace(TIME, kinds=ALONE)
    rows = measure_time(case, families.providers(case), bench_sigmoid.oracle, CPU, budget=0.0)
    timed = [row for row in rows if row.seconds is not None]
    again = measure_again(timed, families.providers(case), CPU, budget=0.0)
    assert [row.provider for row in again] == [row.provider for row in timed]
    assert {COPY, "eager", "pytorch"} <= {row.provider for row in again}
    for row, new in zip(timed, again, strict=True):
        assert new.seconds != row.seconds
        assert replace(new, seconds=row.seconds, samples=row.samples) == row


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    absent = peers.library("nothing", {"focal": ("nothing", bench_sigmoid.formula_of_focal)}, "no_such_library.losses")
    monkeypatch.setattr(bench_sigmoid, "PROVIDERS", (*bench_sigmoid.PROVIDERS, absent))
    command.main(["--device", "cpu", "--suite", "small", "--minutes", "1e-9", "--peers", "nothing", "pytorch"])
    shown = capsys.readouterr().out
    assert "nothing (not installed)" in shown
    assert "Left out: chunked, compile, fvcore, kornia, liger, monai, sentence-transformers, timm." in shown
    with pytest.raises(SystemExit):
        command.main(["--peers", "nobody"])


@pytest.mark.parametrize("median", [0.0, math.nan])
def test_a_row_has_times_above_0(median):
    row = run_of(TIME, eager=1.0).rows[0].to_json() | {"seconds": (1.0, median, 1.0)}
    with pytest.raises(ValueError, match="seconds of eager: expected finite numbers above 0"):
        Row.from_json(row)


@pytest.mark.parametrize("minutes", ["0", "nan", "-1", "soon"])
def test_minutes_that_leave_no_time(minutes, capsys):
    with pytest.raises(SystemExit):
        command.main(["--suite", "small", "--minutes", minutes])
    assert "--minutes" in capsys.readouterr().err


def test_a_claim_on_memory_counts_what_comes_on_top_of_the_gradient():
    row = Row(MEMORY, "eager", "", peak_bytes=MEMORY.logits_bytes + (3 << 20))
    assert Claim("", MEMORY, "eager", at_most=4, over_gradient=True).measured([row]) == 3


@pytest.mark.parametrize("case", [*bench_sigmoid.cases(CPU), *bench_sigmoid.cases(torch.device("cuda"))], ids=str)
def test_a_case_is_read_as_it_was_written(case):
    fields = json.loads(json.dumps(case.to_json()))
    assert Case.from_json(fields) == case
    if case.kinds == EVERYONE:
        del fields["kinds"]  # as in older results
        assert Case.from_json(fields) == case


def test_a_row_that_lost_its_digits_is_kept_as_json():
    row = Row(TIME, "eager", "", status="wrong", loss_error=math.inf, grad_error=0.5, tail_error=math.nan)
    again = Row.from_json(json.loads(json.dumps(row.to_json(), allow_nan=False)))
    assert math.isnan(again.tail_error)
    assert replace(again, tail_error=None) == replace(row, tail_error=None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_claim_is_about_a_case(device):
    device = torch.device(device)
    assert {claim.case for claim in families.claims(device)} <= set(families.cases(device))


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
    monkeypatch.setattr(bench_listwise, "claims", lambda device: ())
    monkeypatch.setattr(run, "_QUICK_BUDGET", 0.0)
    assert command.main(["--device", "cpu", "--quick", "--peers", "pytorch", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "NOT MET" in shown
    assert "Left out: chunked, compile, compiled, fvcore, kornia, liger, monai, sentence-transformers, timm." in shown
    assert "triton (interpreter only: not timed)" in shown

    (path,) = tmp_path.glob("*.json")
    stems = {name.name.removeprefix(path.stem) for name in tmp_path.iterdir()}
    assert stems == {".json", ".md", "-bandwidth.png", "-memory.png"}
    content = json.loads(path.read_text())
    assert [verdict["met"] for verdict in content["claims"]] == [True, False, True]
    states = {(row["case"]["suite"], row["provider"]): row["status"] for row in content["rows"]}
    assert states["sigmoid", "eager"] == states["memory", "pytorch"] == "ok"
    assert states["sigmoid", "triton"] == "missing", "the interpreter is not timed"
    assert str(tmp_path) not in path.read_text()

    kept = Results.load(path)
    assert {row.case for row in kept.rows} == {TIME, MEMORY, SPARSE_MEMORY}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- written by make bench -->\nold\n<!-- end -->\nafter\n")
    report.write_docs(tmp_path, tmp_path / "page.md", readme)
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith("<!-- end -->\nafter\n")
    page = (tmp_path / "page.md").read_text()
    assert TIME.title in page
    assert f"](./{path.stem}-memory.png)" in page


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_oracle_of_lists_takes_the_lists_of_every_case(device):
    for case in bench_listwise.cases(torch.device(device)):
        assert case.shape[0] * case.shape[1] <= check._BLOCK, "all of them at once"
        scores = torch.randn(case.shape[0], 3, dtype=torch.float64)
        losses = bench_listwise.oracle(case.loss, scores, torch.eye(3, dtype=torch.float64)[0].expand_as(scores))
        assert losses.shape == case.shape[:1]


def test_a_case_of_a_layer_comes_back_from_json():
    case = bench_head.cases(CPU)[0]
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert "256 x 384 x 131072" in case.title


def test_the_same_cases_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-max-time=0.01"]
    chosen = ["-k", "small and bce and eager and not module", f"--benchmark-json={tmp_path / 'out.json'}"]
    command = [sys.executable, "-m", "pytest", "bench", *options, *chosen]
    # pytest-benchmark measures nothing where xdist has put its names.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        command, cwd=Path(run.__file__).parent.parent, capture_output=True, text=True, timeout=300, env=env
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert found["group"] == "bce, 32 x 100 float32, float32 targets"
    assert found["stats"]["median"] > 0


def test_every_provider_has_a_colour():
    """Or a run would fail at its end."""
    assert {p.name for family in families.FAMILIES for p in family.PROVIDERS} | {COPY} == set(charts._STYLES)


def test_a_line_of_time_against_size_takes_three_sizes(tmp_path):
    cases = [replace(TIME, shape=(4, labels), upstream=1.0) for labels in (50, 500, 5000)]
    runs = [run_of(case, **{"eager": 1.0, "pytorch": 3.0, COPY: 0.1}) for case in cases]
    two, three = (replace(runs[0], rows=[row for part in runs[:count] for row in part.rows]) for count in (2, 3))
    bandwidth, size = (tmp_path / f"a-cpu-2000-01-01-{name}.png" for name in ("bandwidth", "size"))
    assert charts.draw(two, tmp_path) == [bandwidth]
    assert charts.draw(three, tmp_path) == [size, bandwidth]
    assert size.read_bytes().startswith(b"\x89PNG")
