"""The model of what machine code costs: instructions by pipeline, and the share of the bandwidth that they leave."""

import math

import pytest

pytest.importorskip("triton", reason="Triton has no wheels outside Linux")

from bench.pipes import pipe_of, pipes_of
from bench.sass import parse_sass
from bench.static import GPUS, limit

# Of a kernel compiled for sm_90: a load, a sigmoid, a comparison and its select, an address, a store and the loop.
USAGE = "  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560"
LOOP = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   FMUL R5, R4, 1.4426950216293334961 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/                   FADD R5, R5, 1 ;
        /*0050*/                   MUFU.RCP R6, R5 ;
        /*0060*/                   FSETP.GT.AND P1, PT, R4, RZ, PT ;
        /*0070*/                   FSEL R6, R6, R5, P1 ;
        /*0080*/                   IMAD.WIDE R2, R7, 0x4, R2 ;
        /*0090*/                   STG.E desc[UR4][R2.64], R6 ;
        /*00a0*/              @!P0 BRA 0x10 ;
        /*00b0*/                   EXIT ;
"""


def test_instructions_of_a_loop_by_pipeline() -> None:
    [body] = parse_sass(LOOP, USAGE).loops()
    found = pipes_of(opcode for opcode, _ in body)
    assert found == {"issue": 10, "fma": 2, "xu": 2, "alu": 2, "imad": 1, "lsu": 2, "control": 1}


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("HFMA2.BF16_V2", "fma"),
        ("DSETP.GT.AND", "fp64"),
        ("F2F.F64.F32", "xu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("FMNMX3.NAN", "alu"),
        ("LDS.128", "lsu"),
        ("UIADD3", "uniform"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("HGMMA.64x8x16.F32", "other"),
    ],
)
def test_pipeline_of_an_opcode(opcode: str, pipe: str) -> None:
    assert pipe_of(opcode) == pipe


def test_a_packed_pair_is_two_operations_in_one_slot() -> None:
    assert pipes_of(["FFMA2", "FADD2", "FADD"]) == {"issue": 3, "fma": 5}


def test_clocks_are_those_of_the_vendor() -> None:
    """1410 MHz of A100 and 1980 of H100 stand in their whitepapers; the figure of the peak has three digits."""
    assert math.isclose(GPUS["A100"].clock, 1410e6, rel_tol=2e-3)
    assert math.isclose(GPUS["H100"].clock, 1980e6, rel_tol=2e-3)


@pytest.mark.parametrize(
    ("gpu", "pipes", "bytes_moved", "share", "by"),
    [
        # 4 bytes take 4 / 4.8e12 s; of 132 processors at 1.98 GHz, 128 instructions a clock take 20 / 3.345e13 s.
        ("H200", {"issue": 20.0}, 4, 1.0, "bytes"),
        ("H200", {"issue": 40.0}, 4, 0.697, "issue"),
        # 16 special functions a clock: 4 / 4.18e12 s; half of an A100's bandwidth leaves it more time.
        ("H200", {"issue": 20.0, "xu": 4.0}, 4, 0.871, "xu"),
        ("A100", {"issue": 20.0, "xu": 4.0}, 4, 1.0, "bytes"),
        # An A100 has 64 lanes for floating-point numbers, which integer multiplications take too: 24 / 9.75e12 s.
        ("A100", {"issue": 24.0, "fma": 20.0, "imad": 4.0}, 4, 0.797, "fma"),
        ("H100", {"issue": 24.0, "fma": 20.0, "imad": 4.0}, 4, 1.0, "bytes"),
        ("H200", {"issue": 30.0, "alu": 16.0}, 4, 0.871, "alu"),
    ],
)
def test_the_slowest_pipeline_limits(
    gpu: str, pipes: dict[str, float], bytes_moved: float, share: float, by: str
) -> None:
    found = limit(GPUS[gpu], pipes, bytes_moved)
    assert found.share == pytest.approx(share, abs=2e-3)
    assert found.pipe == by
