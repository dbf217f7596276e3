"""Pictures of a run: time against size, share of a copy's bandwidth, peak memory, small batches."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from .cases import Case, Row
from .measure import COPY
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ours in red, PyTorch's in blue, other libraries in quiet colours: (colour, marker).
_STYLES = {
    "triton": ("#c1121f", "o"),
    "eager": ("#c1121f", "s"),
    "inductor": ("#c1121f", "D"),
    "triton, dense": ("#e89aa0", "o"),
    "eager, dense": ("#e89aa0", "s"),
    "pytorch": ("#14213d", "^"),
    "compile": ("#3a7ca5", "v"),
    "chunked": ("#81a4cd", "P"),
    "fvcore": ("#8d99ae", "x"),
    "kornia": ("#b08968", "+"),
    "monai": ("#6a994e", "1"),
    "timm": ("#bc6c25", "2"),
    "liger": ("#7b2cbf", "*"),
    "sentence-transformers": ("#6a994e", "d"),
    COPY: ("#999999", "_"),
}
_NAMES = {"pytorch": "PyTorch", "compile": "torch.compile", "monai": "MONAI", "chunked": "PyTorch in chunks"}


class Chart(NamedTuple):
    name: str
    title: str
    paint: Callable[[list[Row]], Figure | None]


def draw(run: Results, folder: Path) -> list[Path]:
    """Write the charts that the run has rows for, as PNG files named after it; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    paths = []
    for chart in CHARTS:
        figure = chart.paint(run.rows)
        if figure is not None:
            figure.suptitle(f"{chart.title}\n{run.environment['name']}, {run.environment['date']}", fontsize=11)
            paths.append(_path(run, folder, chart))
            # Without the software's version, the same figures make the same file.
            figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def drawn(run: Results, folder: Path) -> list[tuple[str, str]]:
    """Title and file name of each of a run's charts that a folder holds."""
    paths = [(chart.title, _path(run, folder, chart)) for chart in CHARTS]
    return [(title, path.name) for title, path in paths if path.exists()]


def _path(run: Results, folder: Path, chart: Chart) -> Path:
    return folder / f"{run.stem}-{chart.name}.png"


def _against_size(rows: list[Row]) -> Figure | None:
    """A panel for each loss that was timed at three sizes or more, all else alike."""
    groups: dict[Case, list[Row]] = defaultdict(list)
    for row in rows:
        if row.seconds is not None and row.case.features is None and row.case.upstream == 1:
            groups[replace(row.case, shape=(0, 0), suite="", kinds=())].append(row)
    panels = [group for group in groups.values() if len({row.case.shape for row in group}) >= 3]
    if not panels:
        return None
    figure, axes = _figure(14.0 if len(panels) > 1 else 7.0, 4.2 * -(-len(panels) // 2) + 0.8, len(panels))
    for axis, group in zip(axes, panels, strict=True):
        of_rows = group[0].case.targets != "labels"  # whose size is that of a row
        unit, name = (1e9, "nanoseconds") if _seconds_a_logit(group) > 1e-9 else (1e12, "picoseconds")
        for provider in dict.fromkeys(row.provider for row in group):
            line = sorted(
                (row.case.shape[1] if of_rows else row.case.numel, row.seconds.median / row.case.numel * unit)
                for row in group
                if row.provider == provider and row.seconds
            )
            color, marker = _STYLES[provider]
            axis.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=6, linewidth=1.2)
        ranking = group[0].case.targets in ("relevant", "graded")
        size = "documents" if ranking else "classes" if of_rows else "logits"
        each = "a document" if ranking else "a logit"
        axis.set(xscale="log", yscale="log", xlabel=size, ylabel=f"{name} {each}")
        _plain_numbers(axis)
        case = group[0].case
        axis.set_title(case.title.replace(f" {case.shape[0]} x {case.shape[1]}", ""), fontsize=9)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    _legend(figure, [row for panel in panels for row in panel])
    return figure


def _seconds_a_logit(rows: Iterable[Row]) -> float:
    return median(row.seconds.median / row.case.numel for row in rows if row.seconds)


def _dots(
    rows: Iterable[Row], value: Callable[[Row], float | None], label: str, scale: str = "linear"
) -> Figure | None:
    """A line for each case, a dot on it for each provider."""
    points = [(row, found) for row in rows if (found := value(row)) is not None]
    cases = list(dict.fromkeys(row.case for row, _ in points))
    if not cases:
        return None
    figure, (axis,) = _figure(10.5, 1.8 + 0.32 * len(cases), 1)
    present = [provider for provider in _STYLES if provider in {row.provider for row, _ in points}]
    for row, found in points:
        color, marker = _STYLES[row.provider]
        # A little above or below the line: what is equal stays visible.
        height = cases.index(row.case) + 0.4 * (present.index(row.provider) / max(1, len(present) - 1) - 0.5)
        axis.plot(found, height, color=color, marker=marker, markersize=5.5, linestyle="none", zorder=3)
    axis.set_yticks(range(len(cases)), [case.title for case in cases], fontsize=7.5)
    axis.set(xscale=scale, xlabel=label, ylim=(len(cases) - 0.4, -0.6))
    if scale == "linear":
        axis.set_xlim(left=0)
    else:
        _plain_numbers(axis)
    axis.grid(True, axis="both", color="#e4e4e4", linewidth=0.6)
    _legend(figure, [row for row, _ in points])
    return figure


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, which would choose a window's backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    columns = min(2, panels)
    axes = [figure.add_subplot(-(-panels // columns), columns, i + 1) for i in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _plain_numbers(axis: Axes) -> None:
    """100k rather than 10^5; and 20k between, where an axis has few decades."""
    from matplotlib.ticker import EngFormatter, LogFormatter

    thousands = EngFormatter(sep="")

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            if not super().__call__(x, pos):  # a tick between others that has no label
                return ""
            return f"{x:g}" if x < 1000 else thousands(x, pos)

    for direction in (axis.xaxis, axis.yaxis):
        if direction.get_scale() == "log":
            direction.set_major_formatter(Plain())
            direction.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))
    axis.tick_params(which="minor", labelsize=7)


_LEGEND_INCHES = 1.7  # of the longest name


def _legend(figure: Figure, rows: Iterable[Row]) -> None:
    from matplotlib.lines import Line2D

    present = {row.provider for row in rows}
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=_label(provider))
        for provider, (color, marker) in _STYLES.items()
        if provider in present
    ]
    columns = min(6, len(handles), int(figure.get_figwidth() / _LEGEND_INCHES))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _label(provider: str) -> str:
    ours = provider.partition(",")[0] in ("triton", "eager", "inductor")
    return f"bertloss-fast, {provider}" if ours else _NAMES.get(provider, provider)


def _share(rows: list[Row]) -> Figure | None:
    copies = {row.case: row.seconds.median for row in rows if row.provider == COPY and row.seconds}

    def of_copy(row: Row) -> float | None:
        if row.provider == COPY or row.seconds is None or row.case not in copies:
            return None
        return 100 * copies[row.case] / row.seconds.median

    return _dots(rows, of_copy, "% of the bandwidth of a copy of as many bytes, in the same run")


def _memory(rows: list[Row]) -> Figure | None:
    return _dots(
        rows,
        lambda row: row.peak_bytes / row.case.logits_bytes if row.peak_bytes else None,
        "peak beyond the inputs, in logits tensors",
        "log",
    )


def _small(rows: list[Row]) -> Figure | None:
    return _dots(
        (row for row in rows if row.case.suite == "small"),
        lambda row: row.seconds.median * 1e6 if row.seconds else None,
        "microseconds, forward and backward",
    )


CHARTS = (
    Chart("size", "Time against size: forward and backward, a logit", _against_size),
    Chart("bandwidth", "Share of a copy's bandwidth", _share),
    Chart("memory", "Peak memory", _memory),
    Chart("small", "Small batches", _small),
)
