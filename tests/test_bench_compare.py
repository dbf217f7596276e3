"""What ``python -m bench compare`` tells of two runs."""

from dataclasses import replace

import pytest
from bench_runs import MEMORY, TIME, run_of

from bench import __main__ as command
from bench.cases import Quartiles, Row
from bench.compare import compare
from bench.measure import COPY
from bench.results import Results


@pytest.mark.parametrize(
    ("medians", "changes"),
    [
        ({"eager": 1.0, "pytorch": 3.0, COPY: 0.1}, []),
        ({"eager": 1.5, "pytorch": 3.0, COPY: 0.1}, ["1.50 times the time"]),
        ({"eager": 1.5, "pytorch": 4.5, COPY: 0.15}, []),
        ({"eager": 1.0, "pytorch": 4.5, COPY: 0.1}, []),
        ({"eager": 3.0, "pytorch": 4.5, COPY: 0.15}, ["3.00 times the time, where its peers take 1.50 times theirs"]),
        ({"eager": 0.5, "pytorch": 3.0, COPY: 0.1}, []),
    ],
    ids=["the same", "ours slower", "the machine slower", "a peer slower", "both", "ours faster"],
)
def test_what_became_slower_is_told_from_a_slower_machine(medians, changes):
    old = run_of(TIME, **{"eager": 1.0, "pytorch": 3.0, COPY: 0.1})
    assert [change.what for change in compare(old, run_of(TIME, **medians))] == changes


@pytest.mark.parametrize(("noisy", "changes"), [(4, []), (0, ["1.50 times the time"])])
def test_what_the_peers_move_by_is_the_spread(noisy, changes):
    """The code of 96 peers is what it was, and so many of them take twice as long in the second run."""
    old, new = run_of(TIME, eager=1.0).rows, run_of(TIME, eager=1.5).rows
    for number in range(32):
        case, steady = replace(TIME, shape=(number + 1, 50)), {"timm": 1.0, COPY: 0.1}
        old += run_of(case, pytorch=1.0, **steady).rows
        new += run_of(case, pytorch=2.0 if number < noisy else 1.0, **steady).rows
    assert [change.what for change in compare(Results({}, old), Results({}, new))] == changes


def test_a_median_alone_does_not_tell():
    old, new = run_of(TIME, eager=1.0), run_of(TIME, eager=1.0)
    old.rows[0].seconds, new.rows[0].seconds = Quartiles(1.0, 1.0, 1.1), Quartiles(1.2, 1.6, 1.7)
    assert compare(old, new) == []
    new.rows[0].seconds = Quartiles(1.5, 1.6, 1.7)
    assert [change.what for change in compare(old, new)] == ["1.50 times the time"]


def test_times_that_malloc_decides_are_not_compared():
    kept = replace(TIME, pages="kept")
    old, new = run_of(TIME, eager=1.0, pytorch=1.0), run_of(TIME, eager=3.0, pytorch=1.0)
    assert len(compare(old, new)) == 1
    steady = run_of(kept, eager=1.0, pytorch=1.0).rows
    old.rows += steady
    new.rows += steady
    assert compare(old, new) == []
    slower = run_of(kept, eager=3.0, pytorch=1.0).rows
    assert [change.title for change in compare(old, replace(new, rows=[*new.rows[:2], *slower]))] == [kept.title]


def test_the_command_compares_two_files(tmp_path, capsys):
    files = []
    for number, time in enumerate((1.0, 1.0, 1.5)):
        results = run_of(TIME, **{"eager": time, "pytorch": 3.0, COPY: 0.1})
        results.rows.append(Row(MEMORY, "eager", "eager", True, peak_bytes=10 << 20))
        results.environment["name"] = f"run {number}"
        files.append(str(results.save(tmp_path)))
    assert command.main(["compare", *files[:2]]) == 0
    shown = capsys.readouterr().out
    assert "2 figures of ours in both, 0 in one alone." in shown
    assert "The runs differ in name: run 0 and run 1." in shown
    assert command.main(["compare", files[0], files[2]]) == 1
    assert "1.50 times the time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "expected a file that python -m bench has written"),
        ("[]", "expected a file that python -m bench has written"),
        ('{"environment": {}, "rows": [{}], "claims": []}', "expected a file that python -m bench has written"),
        ('{"environment": {}, "rows": [], "claims": []}', "expected two runs of the same cases"),
    ],
)
def test_files_that_tell_nothing_are_no_comparison(content, message, tmp_path, capsys):
    run = str(run_of(TIME, eager=1.0).save(tmp_path))
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit) as ended:
        command.main(["compare", run, str(other)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"peak_bytes": 20 << 20}, "10.0 MiB more at the peak"),
        ({"peak_bytes": 11 << 20}, None),
        ({"status": "wrong", "note": "loss is off", "peak_bytes": None}, "wrong: loss is off"),
        ({"status": "skipped", "note": "no time", "peak_bytes": None}, None),
    ],
)
def test_what_became_larger_or_wrong(changed, what):
    row = Row(MEMORY, "eager", "eager", True, peak_bytes=10 << 20)
    found = compare(Results({}, [row]), Results({}, [replace(row, **changed)]))
    assert [change.what for change in found] == ([what] if what else [])
