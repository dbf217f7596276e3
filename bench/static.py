"""What the machine code allows on GPUs that are not at hand: a model, not a measurement.

    python -m bench static [--arch sm_90 ...] [--only "focal 2" ...] [--json]

A kernel that only moves its bytes takes bytes / bandwidth. Each pipeline takes its own time for the instructions of an
element, and the slowest leaves a share of the bandwidth. Latency, occupancy, clocks that sink under load and what
caches keep are not in it: where the model says 60%, more cannot be; where it says 100%, less may be.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .sass import Report, make_parser, reports


class Gpu(NamedTuple):
    arch: str
    processors: int
    # Of fp32, two operations for each multiplication with addition: the vendor's figure, which gives the clock.
    tflops: float
    bandwidth: float  # bytes a second
    source: str

    @property
    def clock(self) -> float:
        return self.tflops * 1e12 / (2 * LANES[self.arch]["fma"] * self.processors)


# Operations a clock of each multiprocessor, for compute capability 8.0, 9.0 and 10.0. issue: an instruction for a warp
# from each of four schedulers, in the whitepapers below. The rest from NVIDIA's CUDA C++ Best Practices Guide,
# "Throughput of Native Arithmetic Instructions": fp32 multiplication and addition (fma); comparison, minimum, logic,
# shift, integer addition (alu); integer multiplication (imad, a part of fma); special functions (xu); fp64; warp
# shuffles (lsu).
_OF_90 = {"issue": 128, "fma": 128, "imad": 64, "alu": 64, "xu": 16, "fp64": 64, "lsu": 32}
LANES: dict[str, dict[str, int]] = {
    "sm_80": _OF_90 | {"fma": 64, "fp64": 32},
    "sm_90": _OF_90,
    "sm_100": _OF_90,
}
GPUS = {
    "A100": Gpu("sm_80", 108, 19.5, 2.039e12, "NVIDIA A100 80GB SXM datasheet; A100 architecture whitepaper"),
    "H100": Gpu("sm_90", 132, 66.9, 3.35e12, "NVIDIA H100 SXM5 datasheet; H100 architecture whitepaper"),
    "H200": Gpu("sm_90", 132, 66.9, 4.8e12, "NVIDIA H200 SXM datasheet; of H100's processors"),
    "B200": Gpu(
        "sm_100", 148, 75.0, 8.0e12, "NVIDIA HGX B200 datasheet, a GPU's part; 148 processors as its driver tells"
    ),
}


class Limit(NamedTuple):
    share: float  # of the peak bandwidth, at most 1
    pipe: str  # that sets it, or "bytes"


def limit(gpu: Gpu, pipes: Mapping[str, float], bytes_moved: float) -> Limit:
    """Both by element."""
    used = dict(pipes)
    used["fma"] = used.get("fma", 0) + used.get("imad", 0)
    of_bytes = bytes_moved / gpu.bandwidth
    lanes = {pipe: n * gpu.processors * gpu.clock for pipe, n in LANES[gpu.arch].items()}
    seconds = {"bytes": of_bytes} | {pipe: used.get(pipe, 0) / rate for pipe, rate in lanes.items()}
    slowest = max(seconds, key=lambda pipe: seconds[pipe])
    return Limit(of_bytes / seconds[slowest], slowest)


def limits(report: Report) -> dict[str, Limit]:
    """On each GPU of the report's architecture."""
    return {
        name: limit(gpu, report.pipes, report.bytes_moved)
        for name, gpu in GPUS.items()
        if gpu.arch == report.arch and report.bytes_moved
    }


_SHOWN = ("issue", "fma", "imad", "alu", "xu", "fp64", "lsu")


def table(rows: Sequence[Report]) -> str:
    lines = [
        "A model, not a measurement. By element, on the way through a full tile; of AMD, registers and spills alone.",
        f"{'':36}{'bytes':>6}" + "".join(f"{pipe:>7}" for pipe in _SHOWN) + "  regs spills loops  once  loads; stores"
        "                share of the peak bandwidth, and what limits it",
    ]
    for row in rows:
        costs = "".join(f"{row.pipes.get(pipe, 0):7.2f}" for pipe in _SHOWN) if row.pipes else " " * 7 * len(_SHOWN)
        moved = "; ".join(" ".join(f"{w}x{n}" for w, n in counts.items()) for counts in (row.loads, row.stores))
        shares = "  ".join(f"{name} {at.share:4.0%} {at.pipe}" for name, at in limits(row).items())
        lines.append(
            f"{row.arch:7}{row.variant:29}{row.bytes_moved:6.2f}{costs}{row.registers:6}{row.spills:7}{row.loops:6}"
            f"{row.once:6}  {moved:29} {shares}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser("python -m bench static", __doc__).parse_args(argv)
    rows = reports(args.arch, args.only)
    if args.json:
        records = [row._asdict() | {"limits": {name: at._asdict() for name, at in limits(row).items()}} for row in rows]
        print(json.dumps(records))
    else:
        print(table(rows))
    return 0
