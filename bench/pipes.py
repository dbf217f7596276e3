"""Which part of a GPU executes an instruction: NVIDIA's pipelines, by the opcode in its machine code.

After the pipelines of the profiling guide of Nsight Compute and the classes of the table "Throughput of Native
Arithmetic Instructions" in the CUDA C++ Best Practices Guide, both NVIDIA's. Neither lists opcodes. Taken for granted:
F2FP and I2FP convert in the ALU, and a packed pair of sm_100 (FFMA2) counts as two.
"""

import re
from collections import Counter
from collections.abc import Iterable

# Patterns of whole opcodes without their suffixes, the first that fits; every instruction also takes an issue slot.
_PIPES = {
    "fp64": r"D(FMA|ADD|MUL|SETP|MNMX)",
    "xu": r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV",
    "lsu": r"(LD|ST|ATOM|RED)[GSL]?|LDC|LDSM|STSM|SHFL|C?S2R",
    "imad": r"IMAD|IMUL",
    "fma": r"F?[FH](FMA|MUL|ADD)2?",
    "uniform": r"U[A-Z0-9]+|VOTEU|R2UR|S2UR|LDCU|C?REDUX",
    "control": r"B(RA|AR|SSY|SYNC|REAK)|EXIT|NOP|CALL|RET|WARPSYNC|DEPBAR",
    "alu": r"[FIH]SETP2?|[FI]SET|F?SEL|V?[FI]MNMX3?|VIADDMNMX|VIADD|IADD3?|IABS|P?LOP3|SHF|PRMT|LEA|MOV|[PR]2[PR]|SGXT"
    r"|BMSK|VOTE|[FI]2FP",
}
_PAIRS = re.compile(r"F(FMA|MUL|ADD)2$")


def pipe_of(opcode: str) -> str:
    """``"other"`` where none is known."""
    name = opcode.partition(".")[0]
    return next((pipe for pipe, pattern in _PIPES.items() if re.fullmatch(pattern, name)), "other")


def pipes_of(opcodes: Iterable[str]) -> dict[str, int]:
    """How many operations each pipeline gets, and under "issue" how many slots they take."""
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        counts["issue"] += 1
        counts[pipe_of(opcode)] += 2 if _PAIRS.match(opcode.partition(".")[0]) else 1
    return dict(sorted(counts.items()))
