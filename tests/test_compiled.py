"""A launch of each kind, compiled for four GPUs without having one, and judged by its machine code."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels outside Linux")

from bertloss_fast.kernels import budgets

from bench.sass import ARCHS, Instruction, Report, _disassembled, parse_amdgcn, parse_sass, widths
from bench.variants import LINES, PASSES, POINTWISE, ROWS, SIGMOID, VARIANTS

ROOT = Path(__file__).parents[1]
BUDGETS = budgets.SIGMOID | budgets.LINES | budgets.POINTWISE | budgets.ROWS | budgets.LISTS | budgets.PASSES


# Everything compiles for sm_90, whose instructions have budgets; for the others, of each kernel what holds the most in
# registers, what loads in a way of its own, and each length that rows of classes are cut for. `make test-full`: all.
OF_EVERY_KERNEL = {
    *("focal 2", "focal 3.7 fp32", "focal 2 fp64", "focal 3.7 soft pos_weight", "focal 2 alpha 1001", "ghm"),
    *("bce weight matrix", "bce odd rows", "asymmetric fp32", "balanced soft", "focal 2 alpha mask", "focal 2 loss"),
    *("focal 2 alpha sparse", "focal 2 sparse wide", "balanced sparse", "focal 2 backward none"),
    *("zlpr 1024", "zlpr fp64", "zlpr 16001 fp32", "zlpr partials sparse", "zlpr gradient 20480", "zlpr mask"),
    *("two-way partials fp64", "two-way partials 2048", "two-way gradient mask", "two-way combine", "zlpr total"),
    *("mse both", "kl fp64", "mse int64 targets"),
    *(name for name in ROWS if re.fullmatch(r"ce \d+( fp32)?", name)),
    *("ce 32768 fp32 backward none", "ce 30522 fp64", "ce 1000 z_loss softcap", "poly ce 30522 probabilities"),
    *("ce 20 smoothing weight", "ce 16000 fp32 smoothing weight", "ce 32000 smoothing weight"),
    *("ce 50257 fp64 smoothing weight", "ce 20 fp64 smoothing weight softcap", "ce 16000 fp32 smoothing softcap"),
    *("ce 1000 fp64 z_loss softcap", "r_drop 20 fp64"),
    *("distillation 1000 fp32", "distillation 8192", "r_drop 30522", "js 30522", "js 1000 fp64", "margin_mse 8"),
    *("lambda", "lambda fp64", "lambda 4096", "adr_mse", "list_net 10", "p_list_mle 4096", "multiple_negatives 201"),
    *("positives mask", "row sums sparse", "histogram soft", "histogram sparse", "sum", "rescale bf16"),
}
FULL = os.environ.get("HYPOTHESIS_PROFILE") == "full"


def compiled(variants: Iterable[str], archs: Iterable[str] = ARCHS) -> list[tuple[str, str]]:
    """For each architecture, those of the variants that compile for it here."""
    wanted = [(arch, variant) for arch in archs for variant in variants]
    return [pair for pair in wanted if FULL or pair[0] == "sm_90" or pair[1] in OF_EVERY_KERNEL]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Report]:
    """In a process of its own: here, the kernels belong to the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    others = [arch for arch in ARCHS if arch != "sm_90"]
    rows = []
    for archs, variants in ((["sm_90"], VARIANTS), (others, VARIANTS if FULL else OF_EVERY_KERNEL)):
        command = [sys.executable, "-m", "bench.sass", "--json", "--arch", *archs, "--only", *variants]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows += [Report(**row) for row in json.loads(done.stdout)]
    return {(row.arch, row.variant): row for row in rows}


@pytest.mark.parametrize(("arch", "variant"), compiled(VARIANTS))
def test_registers_suffice(reports: dict[tuple[str, str], Report], arch: str, variant: str) -> None:
    report = reports[arch, variant]
    assert 0 < report.registers <= (255 if ARCHS[arch].backend == "cuda" else 512)
    launch = VARIANTS[variant]
    if getattr(launch, "targets", None) == "sparse" or (variant in LINES and launch.mask):
        # ptxas puts a few predicates on the stack, nearly all of them where a tile has labels.
        assert report.spills_on_way <= report.elements / 4
        assert report.spills <= 24
    else:
        assert (report.spills, report.stack) == (0, 0)


def whole(size: int) -> Counter[str]:
    """The fewest accesses to so many consecutive bytes."""
    return Counter({"16": size // 16} if size >= 16 else {str(size): 1})


# Of sparse targets on AMD, LLVM moves rare parts out of their loop, and what is left cannot be told apart by its jumps.
WAYS = [
    (arch, variant)
    for arch, variant in compiled(SIGMOID)
    if SIGMOID[variant].targets != "sparse" or ARCHS[arch].backend == "cuda"
]
NVIDIA = [arch for arch, target in ARCHS.items() if target.backend == "cuda"]


@pytest.mark.parametrize(("arch", "variant"), WAYS)
def test_memory_is_accessed_in_full_vectors(reports: dict[tuple[str, str], Report], arch: str, variant: str) -> None:
    """Nothing is read twice, by the element or through other threads, where alignment does not force it."""
    report, launch = reports[arch, variant], SIGMOID[variant]
    assert report.loops == 2, "one over full tiles, one over the rest"
    assert report.exchanges == 0

    def contiguous(dtype: torch.dtype) -> Counter[str]:
        return whole(report.elements * dtype.itemsize)

    def by_label(dtype: torch.dtype, stride: int = 0) -> Counter[str]:
        aligned = launch.num_labels % report.elements == 0 and stride % report.elements == 0
        return contiguous(dtype) if aligned else Counter({str(dtype.itemsize): report.elements})

    logits = contiguous(launch.inputs)
    if ARCHS[arch].backend == "cuda":
        assert logits == {"16": 2 if launch.targets == "sparse" and launch.rows < 10**6 else 1}
    if launch.targets == "sparse":  # and a few indices
        assert {width: number for width, number in report.loads.items() if int(width) > 8} == logits
        assert report.stores == logits
        return
    loads = contiguous(launch.targets)
    loads += logits if launch.row_stride is None else by_label(launch.inputs, launch.row_stride)
    if launch.step == "backward none":
        loads += logits
    if launch.mask:
        loads += contiguous(torch.bool)
    if launch.sample_weight or launch.formula in ("balanced", "ghm"):  # by row, or from a table
        loads += Counter({"4": report.elements * (3 if launch.formula == "balanced" else 1)})
    for operand in (launch.alpha, launch.weight, launch.pos_weight):
        if operand == "[L]":
            loads += by_label(launch.compute_dtype)
        elif operand == "[N, L]":
            loads += contiguous(launch.compute_dtype)
    assert report.loads == loads
    assert report.stores == ({} if launch.step == "loss" else logits)


@pytest.mark.parametrize(("arch", "variant"), compiled(POINTWISE))
def test_pointwise_losses_access_memory_in_full_vectors(
    reports: dict[tuple[str, str], Report], arch: str, variant: str
) -> None:
    report, launch = reports[arch, variant], POINTWISE[variant]
    assert (report.loops, report.exchanges) == (2, 0)
    dtypes = [launch.inputs, launch.targets]
    dtypes += [] if launch.weight is None else [launch.weight]
    dtypes += [torch.bool] if launch.mask else []
    dtypes += [launch.inputs] if launch.step == "backward none" else []
    assert report.loads == sum((whole(report.elements * dtype.itemsize) for dtype in dtypes), Counter())
    written = [launch.inputs, launch.targets] if launch.step == "both" else [launch.inputs]
    assert report.stores == sum((whole(report.elements * dtype.itemsize) for dtype in written), Counter())


@pytest.mark.parametrize(
    ("arch", "variant"),
    compiled([name for name in PASSES if not name.startswith(("row sums", "sum", "rescale"))], NVIDIA),
)
def test_passes_access_memory_in_full_vectors(reports: dict[tuple[str, str], Report], arch: str, variant: str) -> None:
    report, launch = reports[arch, variant], PASSES[variant]
    assert report.loops == 2
    dtypes = [launch.targets] if isinstance(launch.targets, torch.dtype) else []
    dtypes += [launch.inputs] if launch.kind == "histogram" else []
    dtypes += [torch.bool] if launch.mask else []
    wanted = sum((whole(report.elements * dtype.itemsize) for dtype in dtypes), Counter())
    found = {width: number for width, number in report.loads.items() if launch.targets != "sparse" or int(width) > 8}
    assert found == wanted
    assert not report.stores


@pytest.mark.parametrize(
    ("arch", "variant"), compiled([name for name, launch in LINES.items() if launch.num_labels % 1024 == 0], NVIDIA)
)
def test_aligned_rows_are_accessed_in_full_vectors(
    reports: dict[tuple[str, str], Report], arch: str, variant: str
) -> None:
    """Where the number of labels is not a multiple of 16, rows begin anywhere, and their elements load one by one."""
    report, launch = reports[arch, variant], LINES[variant]
    logits = Counter({"16": report.elements * launch.inputs.itemsize // 16})
    full = Counter({width: number for width, number in report.loads.items() if int(width) == 16})
    assert full >= logits + Counter({"16": report.elements // 16})
    assert {width for width in report.loads if int(width) < 4} == set(), "what is left are slopes"
    assert report.stores == ({"4": 4} if launch.kind == "partials" else logits)


@pytest.mark.parametrize(
    ("arch", "variant"), compiled([name for name, launch in ROWS.items() if launch.num_classes % 1024 == 0], NVIDIA)
)
def test_aligned_rows_of_classes_too(reports: dict[tuple[str, str], Report], arch: str, variant: str) -> None:
    report, launch = reports[arch, variant], ROWS[variant]
    logits = report.elements * launch.inputs.itemsize // 16
    read_twice = launch.num_classes > 32768
    # Of two rows of logits one is a teacher's, which has no gradient.
    assert report.loads.get("16", 0) == logits * (2 if read_twice or launch.formula == "distillation" else 1)
    assert report.stores.get("16", 0) == logits


def test_what_the_memory_leaves_time_for(reports: dict[tuple[str, str], Report]) -> None:
    """An H200 moves the 4 bytes of a bf16 logit and its gradient in the time of 25 to 31 instructions."""
    assert reports["sm_90", "ce 1000"].instructions <= 25
    assert reports["sm_90", "ce 30522"].instructions <= 30


@pytest.mark.parametrize("variant", BUDGETS)
def test_cost_is_within_budget(reports: dict[tuple[str, str], Report], variant: str) -> None:
    report, budget = reports["sm_90", variant], BUDGETS[variant]
    assert 0 < report.instructions <= budget.instructions
    assert report.special <= budget.special < report.instructions


@pytest.mark.parametrize("variant", ["focal 2 sparse", "focal 2 alpha sparse"])
def test_a_tile_without_labels_finds_that_out_soon(reports: dict[tuple[str, str], Report], variant: str) -> None:
    """With 5 labels a row, a bisection takes 3 steps; all in all at most what the memory of an H200 leaves time for."""
    report = reports["sm_90", variant]
    assert report.search > 0
    assert report.instructions + 3 * report.search <= 30


def test_every_instruction_has_its_pipeline(reports: dict[tuple[str, str], Report]) -> None:
    """Else the model of `python -m bench static` leaves it out."""
    unknown = [(report.arch, report.variant) for report in reports.values() if "other" in report.pipes]
    assert not unknown


def test_every_kernel_of_many_elements_has_its_budget() -> None:
    per_line = {name for name in LINES if name.endswith(("combine", "total"))} | {"sum", "sum bf16"}
    assert set(BUDGETS) == set(VARIANTS) - per_line


def test_sass_is_understood() -> None:
    """A loop that loads, a predicated load and a spill in it, a loop that only counts, and the padding at the end."""
    code = parse_sass(
        """
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x0000000000017802 */
                                                                      /* 0x000fe20000000f00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0000000000047981 */
        /*0020*/              @!P0 LDG.E.U16 R8, [R2.64+0x8] ;         /* 0x0000000000087981 */
        /*0030*/                   LDG.E R9, [R2.64+0x10] ;            /* 0x0000000000097981 */
        /*0040*/                   STL [R1], R4 ;                      /* 0x0000000000007387 */
        /*0050*/              @!P1 BRA 0x70 ;                          /* 0x0000000000009947 */
        /*0060*/                   LDL.64 R4, [R1] ;                   /* 0x0000000000047983 */
        /*0070*/                   STG.E.64 [R2.64], R4 ;              /* 0x0000000000007986 */
        /*0080*/              @!P0 BRA 0x10 ;                          /* 0x0000000000008947 */
        /*0090*/                   IADD3 R0, R0, 0x1, RZ ;             /* 0x0000000000007810 */
        /*00a0*/               @P2 BRA 0x90 ;                          /* 0x0000000000002947 */
        /*00b0*/                   EXIT ;                              /* 0x000000000000794d */
        /*00c0*/                   BRA 0xc0;                           /* 0x0000000000007947 */
""",
        """
 Function _kernel:
  REG:24 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:560
""",
    )
    assert (code.registers, code.stack, code.spills) == (24, 24, 2)
    assert len(code.instructions) == 13
    [body] = code.loops()
    assert (body[0].opcode, body[-1]) == ("LDG.E.128", Instruction("BRA", 0))
    assert widths(body, "load") == {"2": 1, "4": 1, "16": 1}
    assert widths(body, "store") == {"8": 1}


def test_kernels_that_are_disassembled_together_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"        /*{16 * n:04x}*/  NOP ;  /* 0x{n} */\n                 /* 0x0 */\n" for n in range(5)]
    monkeypatch.setattr("bench.sass._output_of", lambda tool, option, *, file: ".section\n" + "".join(lines))
    first, second = _disassembled("sm_90", [bytes(3 * 16), bytes(2 * 16)])
    assert (first, second) == ("".join(lines[:3]), "".join(lines[3:]))
    with pytest.raises(AssertionError, match="an instruction a line"):
        list(_disassembled("sm_90", [bytes(3 * 16)]))


def test_amdgcn_is_understood() -> None:
    code = parse_amdgcn(
        """
_kernel:                                ; @_kernel
	.loc	1 1 0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v9, s[4:7], 0 offen
	global_load_ushort v4, v[0:1], off
	s_cbranch_execz .LBB0_2
	v_exp_f32_e32 v5, v5
.LBB0_2:
	global_store_short v[0:1], v4, off
	s_cbranch_scc1 .LBB0_1
	s_endpgm
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 1
    .vgpr_count:     46
    .vgpr_spill_count: 2
"""
    )
    assert (code.registers, code.stack, code.spills) == (46, 12, 2)
    [body] = code.loops()
    assert [opcode for opcode, _ in body][::5] == ["buffer_load_dwordx4", "s_cbranch_scc1"]
    assert widths(body, "load") == {"2": 1, "16": 1}
    assert widths(body, "store") == {"2": 1}
