"""The passes before a loss: counts, sums by row and histograms, against float64 on dense matrices."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from cases import uniform
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheels outside Linux")

from bertloss_fast.kernels.elements import Matrices
from bertloss_fast.kernels.formulas import Values
from bertloss_fast.kernels.passes import (
    FIXED,
    count_launcher,
    histogram_launcher,
    num_histograms,
    num_partials,
    row_sum_launcher,
    sum_launcher,
)
from bertloss_fast.kernels.sigmoid import sigmoid_launcher
from bertloss_fast.kernels.upstream import Upstream

IGNORED = -1
# Hard labels are compared as they are, soft ones widened first; sparse ones are looked for.
TARGETS = {
    "bool": lambda u: u < 0.3,
    "int8-ignored": lambda u: (u < 0.3).to(torch.int8).masked_fill(u > 0.9, IGNORED),
    "int64-ignored": lambda u: (u < 0.3).to(torch.int64).masked_fill(u > 0.9, IGNORED),
    "float-soft": lambda u: u.float(),
    "bfloat16-ignored": lambda u: u.to(torch.bfloat16).masked_fill(u > 0.9, IGNORED),
    "double-ignored": lambda u: u.masked_fill(u > 0.9, IGNORED),
    "sparse": lambda u: u < 0.3,
}
DENSE = [name for name in TARGETS if name != "sparse"]
LAYOUTS = {
    "contiguous": lambda matrix: matrix,
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "every-other": lambda matrix: matrix.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
}


class Regime(NamedTuple):
    """Where the elements lie, and what counts them."""

    shape: tuple[int, int]
    layout: str
    masked: bool
    compute: torch.dtype
    smoothing: float
    bins: int


REGIMES = {
    "an element": Regime((1, 1), "contiguous", False, torch.float64, 0.0, 1),
    "a column, whose stride is anybody's": Regime((70, 1), "transposed", True, torch.float32, 0.1, 10),
    "less than a tile": Regime((3, 7), "every-other", False, torch.float32, 0.1, 5),
    "a tile and a rest, a row across their seam": Regime((17, 131), "contiguous", True, torch.float32, 0.0, 30),
    "the same by row and column": Regime((17, 131), "transposed", True, torch.float64, 0.1, 10),
    "rows longer than a block": Regime((2, 1500), "every-other", False, torch.float32, 0.0, 100),
}
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 0.0}, torch.float64: {"rtol": 1e-13, "atol": 0.0}}
regimes = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)


def csr(targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, labels = targets.nonzero(as_tuple=True)
    crow = torch.searchsorted(rows, torch.arange(targets.shape[0] + 1, device=targets.device))
    return crow, labels.to(torch.int32)


def operands(name: str, regime: Regime, device: torch.device) -> tuple[Any, Tensor | None, Tensor, Tensor]:
    """Targets and mask as a launcher takes them; and the labels in float64, and which elements count."""
    layout = LAYOUTS[regime.layout]
    targets = TARGETS[name](uniform(*regime.shape, device=device))
    kept = targets != IGNORED
    mask = None
    if regime.masked:
        mask = layout(uniform(*regime.shape, device=device, seed=2) < 0.8)
        kept &= mask
    return csr(targets) if name == "sparse" else layout(targets), mask, targets.double(), kept


def logits(shape: tuple[int, int], device: torch.device) -> Tensor:
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x.view(-1)[3::17] = float("inf")
    x.view(-1)[4::19] = -float("inf")
    return x.to(device)


@regimes
@pytest.mark.parametrize("name", DENSE)
def test_counts(name: str, regime: Regime, device: torch.device) -> None:
    targets, mask, y, kept = operands(name, regime, device)
    partials = torch.empty(num_partials(y.numel()), dtype=regime.compute, device=device)
    total = torch.empty((), dtype=torch.float64, device=device)
    for positives, value in ((False, torch.ones_like(y)), (True, y)):
        matrices = Matrices(None, targets, mask, IGNORED, regime.compute)
        count_launcher(matrices, y.shape, partials, positives=positives)
        sum_launcher(partials, total)
        torch.testing.assert_close(total, value[kept].sum(), **TOLERANCE[regime.compute])


@regimes
def test_counts_a_mask_alone(regime: Regime, device: torch.device) -> None:
    _, mask, _, kept = operands("bool", regime._replace(masked=True), device)
    partials = torch.empty(num_partials(kept.numel()), device=device)
    count_launcher(Matrices(None, None, mask, None, torch.float32), kept.shape, partials, positives=False)
    assert partials.sum() == kept.sum()


@pytest.mark.parametrize("programs", [1, 2, 6])
def test_any_number_of_programs_counts_the_same(programs: int, device: torch.device) -> None:
    """Fewer than full tiles, so that one takes several; as many; and more, which have none. The rest is the first's."""
    regime = Regime((45, 131), "contiguous", True, torch.float32, 0.0, 10)
    targets, mask, _, kept = operands("bool", regime, device)
    partials = torch.empty(programs, device=device)
    matrices = Matrices(logits(regime.shape, device), targets, mask, None, torch.float64)
    count_launcher(matrices, regime.shape, partials, positives=False)
    counts = torch.empty(programs, 10, dtype=torch.int32, device=device)
    histogram_launcher(matrices, counts, bins=10, smoothing=0.0)
    assert partials.tolist() == counts.sum(1).tolist()
    assert partials.sum() == kept.sum()
    assert partials.count_nonzero() == min(programs, 2)


def test_a_sum_is_no_less_than_asked(device: torch.device) -> None:
    for values, expected in (([0.0, 0.25], 1.0), ([1.0, 2.5, 3.0], 6.5), ([float("nan")], float("nan"))):
        total = torch.empty((), device=device)
        sum_launcher(torch.tensor(values, device=device), total, at_least=1)
        torch.testing.assert_close(total.item(), expected, equal_nan=True)


@regimes
@pytest.mark.parametrize("name", TARGETS)
def test_row_sums(name: str, regime: Regime, device: torch.device) -> None:
    targets, mask, y, kept = operands(name, regime, device)
    weights = 0.1 + uniform(regime.shape[1], device=device, seed=3).to(regime.compute)
    sums = torch.empty(regime.shape[0], dtype=regime.compute, device=device)
    soft = isinstance(targets, Tensor) and targets.is_floating_point()
    units = weights if soft else (weights.double() * FIXED.value).round().long()
    row_sum_launcher(Matrices(None, targets, mask, IGNORED, regime.compute), units, sums)
    expected = torch.where(kept, y * weights, 0.0).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(sums.double(), expected, **TOLERANCE[regime.compute])


def test_rows_without_labels_sum_up_to_more_than_0(device: torch.device) -> None:
    none = torch.zeros(70, 9, dtype=torch.bool, device=device)
    for targets in (none, csr(none)):
        sums = torch.empty(70, device=device)
        row_sum_launcher(Matrices(None, targets, None, None, sums.dtype), torch.ones(9, device=device).long(), sums)
        assert (sums == torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@regimes
@pytest.mark.parametrize("name", ["int8-ignored", "bfloat16-ignored", "sparse"])
def test_histograms(name: str, regime: Regime, dtype: torch.dtype, device: torch.device) -> None:
    shape, layout, _, _, smoothing, bins = regime
    targets, mask, y, kept = operands(name, regime, device)
    x = logits(shape, device).to(dtype)
    y = y * (1 - smoothing) + 0.5 * smoothing
    for seed in itertools.count(5):  # until rounding decides for no element on which side of an edge it lies
        scaled = (x.double().sigmoid() - y).abs() * bins
        near = ((scaled - scaled.round()).abs() < 0.02) & (scaled > 0.5) & (scaled < bins - 0.5)
        if not near.any():
            break
        x = torch.where(near, uniform(*shape, device=device, seed=seed).to(dtype), x)
    counts = torch.empty(num_histograms(x.numel()), bins, dtype=torch.int32, device=device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = Matrices(LAYOUTS[layout](x), targets, mask, IGNORED, compute)
    histogram_launcher(matrices, counts, bins=bins, smoothing=smoothing)
    expected = torch.bincount(scaled[kept].long().clamp(max=bins - 1), minlength=bins)
    assert counts.sum(0).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bool", "bfloat16-ignored", "sparse"])
def test_the_loss_finds_the_bin_that_was_counted(
    name: str, smoothing: float, dtype: torch.dtype, device: torch.device
) -> None:
    """To the last bit: an element counted in one bin and weighted by another may find that one empty."""
    regime = Regime((17, 131), "contiguous", True, torch.float32, smoothing, 10)
    targets, mask, _, kept = operands(name, regime, device)
    x = logits(regime.shape, device).nan_to_num(posinf=2.0, neginf=-2.0).to(dtype)
    matrices = Matrices(x, targets, mask, IGNORED, torch.float32)
    counts = torch.empty(num_histograms(x.numel()), 10, dtype=torch.int32, device=device)
    histogram_launcher(matrices, counts, bins=10, smoothing=smoothing)
    bce, ghm = torch.empty(2, *regime.shape, device=device)
    for formula, table, loss in (("bce", None, bce), ("ghm", torch.arange(1.0, 11.0, device=device), ghm)):
        values = Values(table=table)
        arguments = ((10,), matrices, None, None, (), values, 1, Upstream(), loss, None)
        sigmoid_launcher(formula, *arguments, smoothing=smoothing, reduced=False, written=False)
    found = (ghm / bce).round().long()[kept] - 1
    assert counts.sum(0).tolist() == torch.bincount(found, minlength=10).tolist()


@pytest.mark.parametrize("name", ["bool", "float-soft", "sparse"])
def test_nan_is_counted_in_some_bin(name: str, device: torch.device) -> None:
    targets, _, y, _ = operands(name, REGIMES["less than a tile"], device)
    x = torch.full_like(y, float("nan"))
    counts = torch.empty(1, 10, dtype=torch.int32, device=device)
    histogram_launcher(Matrices(x, targets, None, None, x.dtype), counts, bins=10, smoothing=0.0)
    assert counts.sum() == x.numel()


def test_offsets_past_32_bits(device: torch.device) -> None:
    """Three rows 2^30 elements apart; on the CPU, only the pages that they lie on take memory."""
    shape = (3, 600)
    y = TARGETS["int8-ignored"](uniform(*shape, device=device))
    far = torch.empty(2**31 + 600, dtype=torch.int8, device=device).as_strided(shape, (2**30, 1)).copy_(y)
    matrices = Matrices(torch.zeros(shape, device=device), far, None, IGNORED, torch.float32)
    partials, sums = torch.empty(1, device=device), torch.empty(3, device=device)
    count_launcher(matrices, shape, partials, positives=True)
    row_sum_launcher(matrices, torch.full((600,), FIXED.value, device=device), sums)
    counts = torch.empty(1, 3, dtype=torch.int32, device=device)
    histogram_launcher(matrices, counts, bins=3, smoothing=0.0)
    assert sums.tolist() == (y == 1).sum(1).tolist()
    assert partials.item() == (y == 1).sum()
    assert counts.tolist() == [[0, (y != IGNORED).sum(), 0]]
