"""What the kernels compile to, read from their machine code. Needs no GPU and no driver.

    python -m bench.sass [--arch sm_90 ...] [--only "focal 2" ...] [--json]

Counts are those of the loop over full tiles, divided by the elements that a thread handles in one turn. What surrounds
it, the masked copy of the loop for the last tile and the sums, runs once a program and is counted apart.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from bertloss_fast.kernels import device
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .pipes import pipes_of
from .variants import VARIANTS

ARCHS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver:
    """As much of a GPU's driver as compiling asks for. The target is the device too: Triton keeps kernels by device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    get_current_device = get_current_target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


def _bytes_moved(args: Iterable[Any]) -> float:
    """By a launch, for each element of its largest matrix: matrices once, however often they are read; no vectors."""
    tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)}
    elements = max(tensor.numel() for tensor in tensors.values())
    matrices = [tensor for tensor in tensors.values() if tensor.numel() == elements and tensor.stride().count(0) == 0]
    return float(sum(tensor.element_size() for tensor in matrices))


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[tuple[CompiledKernel, float]]]:
    """Compile what launchers launch on meta tensors, and run none of it. Beside each kernel, the bytes by element.

    One kind of GPU a process: whether kernels hold PTX is a constant, which Triton does not let change.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing")
    kernels = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append((run(kernel, *args, grid=grid, warmup=True, **options), _bytes_moved(args)))

    driver.set_active(_Driver(target))
    device.USE_PTX = tl.constexpr(target.backend == "cuda")
    device.LANES = target.warp_size
    meta = SimpleNamespace(device_of=nullcontext)  # what launchers ask of a tensor's device
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(torch, "meta", meta, create=True):
        yield kernels


class Instruction(NamedTuple):
    opcode: str
    jump: int | None = None  # the index of the instruction that a branch leads to


class Code(NamedTuple):
    """A kernel's machine code, with the registers and the memory that it asks for."""

    instructions: list[Instruction]
    registers: int
    stack: int  # bytes
    spills: int  # accesses to the stack; for AMD, vector registers moved to it or to another kind of register

    def loops(self) -> list[list[Instruction]]:
        """The loops that read global memory, in the order of the code."""
        ends: dict[int, int] = {}
        for index, (_, jump) in enumerate(self.instructions):
            if jump is not None and jump < index:  # a jump to itself only pads the end
                ends[jump] = index + 1
        outermost, reached = [], 0
        for start, end in sorted(ends.items()):
            if start >= reached:  # what lies within another is a part of it
                outermost.append(self._relative(start, end))
                reached = end
        return [body for body in outermost if widths(body, "load")]

    def _relative(self, start: int, end: int) -> list[Instruction]:
        """A part of the code, with jumps that count from its beginning."""
        return [
            Instruction(opcode, None if jump is None else jump - start) for opcode, jump in self.instructions[start:end]
        ]


def parse_sass(text: str, usage_of: str) -> Code:
    """The output of ``nvdisasm`` and of ``cuobjdump -res-usage``."""
    lines = re.findall(r"^\s+/\*(\w{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    index_of = {int(address, 16): index for index, (address, _, _) in enumerate(lines)}
    instructions = []
    for _, opcode, operands in lines:
        target = re.search(r"0x(\w+)\s*$", operands) if opcode.startswith("BRA") else None
        instructions.append(Instruction(opcode, index_of[int(target[1], 16)] if target else None))
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage_of)}
    spills = sum(opcode.startswith(("LDL", "STL")) for opcode, _ in instructions)
    return Code(instructions, usage["REG"], usage["STACK"] + usage["LOCAL"], spills)


def parse_amdgcn(text: str) -> Code:
    """The assembly of LLVM's AMDGPU target."""
    lines: list[tuple[str, str]] = []
    index_of = {}
    for label, opcode, operands in re.findall(r"^(?:(\.L\w+):|\t([a-z]\w+)([^;\n]*))", text, re.MULTILINE):
        if label:
            index_of[label] = len(lines)
        else:
            lines.append((opcode, operands.strip()))
    instructions = [
        Instruction(opcode, index_of[operands] if re.match(r"s_c?branch", opcode) else None)
        for opcode, operands in lines
    ]
    notes = {name: int(number) for name, number in re.findall(r"^ +\.(\w+): +(\d+)$", text, re.MULTILINE)}
    # What scalar registers spill lies in lanes of a vector register: instructions, and no memory.
    return Code(instructions, notes["vgpr_count"], notes["private_segment_fixed_size"], notes["vgpr_spill_count"])


def machine_codes(arch: str, kernels: Sequence[CompiledKernel]) -> list[Code]:
    """What the kernels, compiled for an architecture, consist of."""
    if ARCHS[arch].backend != "cuda":
        return [parse_amdgcn(kernel.asm["amdgcn"]) for kernel in kernels]
    cubins = [kernel.asm["cubin"] for kernel in kernels]
    texts = _disassembled(arch, [_code_section(cubin) for cubin in cubins])
    usage = [_output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file=cubin) for cubin in cubins]
    return [parse_sass(*of_kernel) for of_kernel in zip(texts, usage, strict=True)]


_INSTRUCTION_BYTES = 16  # since Volta


def _disassembled(arch: str, codes: Sequence[bytes]) -> Iterator[str]:
    """All in one run of nvdisasm, which takes longer to start than for a hundred kernels."""
    option = f"--binary={arch.upper().replace('_', '')}"
    text = _output_of(triton.knobs.nvidia.nvdisasm.path, option, file=b"".join(codes))
    begins = [match.start() for match in re.finditer(r"^\s+/\*\w{4,}\*/", text, re.MULTILINE)] + [len(text)]
    ends = [0, *itertools.accumulate(len(code) // _INSTRUCTION_BYTES for code in codes)]
    assert ends[-1] == len(begins) - 1, "an instruction a line"
    for first, end in itertools.pairwise(ends):
        yield text[begins[first] : begins[end]]


def _code_section(cubin: bytes) -> bytes:
    """The section of a cubin, an ELF file of 64 bits, that has its one kernel's code."""
    (heads,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section the offset of its name, and where it stands and ends.
    sections = [struct.unpack_from("<I20xQQ", cubin, heads + i * size) for i in range(number)]
    start_of_names = sections[names][1]
    [code] = [
        cubin[start : start + length]
        for name, start, length in sections
        if cubin.startswith(b".text.", start_of_names + name)
    ]
    return code


def _output_of(tool: str, option: str, *, file: bytes) -> str:
    with tempfile.NamedTemporaryFile() as named:
        named.write(file)
        named.flush()
        return subprocess.run([tool, option, named.name], check=True, capture_output=True, text=True).stdout


def shortest_way(body: list[Instruction]) -> list[Instruction]:
    """The fewest instructions from the beginning of a loop to its end.

    Where a loop has rare parts, such as the tiles of sparse targets that have labels, this is the way around them; a
    loop within it counts as passed over.
    """
    last = len(body) - 1
    before: dict[int, int] = {}
    frontier = [0]
    while last not in before and frontier:
        steps = []
        for index in frontier:
            jump = body[index].jump
            following = [index + 1] if jump is None or not index < jump <= last else [index + 1, jump]
            for step in following:
                if step <= last and step not in before:
                    before[step] = index
                    steps.append(step)
        frontier = steps
    way = [last]
    while way[-1] != 0:
        way.append(before[way[-1]])
    return [body[index] for index in reversed(way)]


def inner_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The loops within a loop, in the order of the code."""
    jumps = {jump: index + 1 for index, (_, jump) in enumerate(body[:-1]) if jump is not None and 0 <= jump < index}
    return [body[start:end] for start, end in sorted(jumps.items())]


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_WIDTHS |= {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def widths(instructions: Iterable[Instruction], kind: str) -> dict[str, int]:
    """How many loads or stores of global memory there are of each width in bytes, in JSON's terms."""
    counts: Counter[int] = Counter()
    for opcode, _ in instructions:
        if opcode.startswith({"load": "LDG", "store": "STG"}[kind]):
            counts[next((_WIDTHS[part] for part in opcode.split(".") if part in _WIDTHS), 4)] += 1
        elif match := re.match(rf"(?:global|buffer|flat)_{kind}_[us]?(byte|short|dword(?:x\d)?)", opcode):
            counts[_WIDTHS[match[1]]] += 1
    return {str(width): number for width, number in sorted(counts.items())}


def _count(instructions: Iterable[Instruction], pattern: str) -> int:
    return sum(re.match(pattern, opcode) is not None for opcode, _ in instructions)


class Report(NamedTuple):
    """What a variant costs on an architecture."""

    arch: str
    variant: str
    registers: int
    stack: int
    spills: int
    loops: int  # two: full tiles, and the rest
    once: int  # instructions outside the first
    # of the first loop, on its shortest way: that of a tile without labels
    elements: int  # of a thread, in one turn
    instructions: float  # per element
    special: float  # functions per element
    search: float  # instructions per element, for each step of the search for the tile's labels
    loads: dict[str, int]  # in one turn: width in bytes, number
    stores: dict[str, int]
    spills_on_way: int  # accesses to the stack
    exchanges: int  # shared memory, shuffles and barriers
    pipes: dict[str, float]  # operations per element of each of NVIDIA's pipelines
    bytes_moved: float  # per element


_OF_ROWS = ("_softmax_kernel", "_pairs_kernel", "_lists_kernel", "_ranked_kernel", "_adr_mse_kernel")
_TILE_SIZES = {"BLOCK", "ROWS", "BLOCK_N", "BLOCK_L", "BLOCK_I", "BLOCK_J", "PARTS", "LINES"}


def report(arch: str, variant: str, kernel: CompiledKernel, bytes_moved: float, code: Code) -> Report:
    loops = code.loops()
    of_rows = kernel.src.fn.__name__ in _OF_ROWS
    if of_rows:
        # One loop over rows; of long rows a loop for each reading; or none, where a program has one row in one tile.
        body = [instruction for loop in loops for instruction in loop] or code.instructions
    else:
        # Full tiles come first in the source, and the compilers keep it so.
        body = loops[0] if loops else []
    searches = [] if of_rows else inner_loops(body)
    way = shortest_way(body) if searches else body
    names = kernel.src.fn.arg_names
    tile = math.prod(size for path, size in kernel.src.constants.items() if names[path[0]] in _TILE_SIZES)
    threads = kernel.metadata.num_warps * ARCHS[arch].warp_size
    elements = max(tile // threads, 1)
    return Report(
        arch,
        variant,
        code.registers,
        code.stack,
        code.spills,
        len(loops),
        len(code.instructions) - len(body),
        elements,
        len(way) / elements,
        _count(way, r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_") / elements,
        len(searches[0]) / elements if searches else 0.0,
        widths(way, "load"),
        widths(way, "store"),
        _count(way, r"LDL|STL|scratch_"),
        _count(way, r"BAR\b|LDS|STS|SHFL|s_barrier|ds_"),
        {} if "amdgcn" in kernel.asm else {pipe: n / elements for pipe, n in pipes_of(op for op, _ in way).items()},
        bytes_moved,
    )


def _reports_of(arch: str, variants: list[str]) -> list[Report]:
    found = []
    with compiling(ARCHS[arch]) as kernels:
        for variant in variants:
            VARIANTS[variant].launch()
            found.append(kernels.pop())
    codes = machine_codes(arch, [kernel for kernel, _ in found])
    return [report(arch, variant, *of, code) for variant, of, code in zip(variants, found, codes, strict=True)]


def reports(archs: list[str], variants: list[str]) -> list[Report]:
    """Compile and report, in one process an architecture."""
    with multiprocessing.get_context("spawn").Pool(min(len(archs), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        by_arch = pool.starmap(_reports_of, [(arch, variants) for arch in archs], chunksize=1)
    return [report for reports in by_arch for report in reports]


def make_parser(prog: str, doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--json", action="store_true", help="print records instead of the table")
    return parser


def main() -> None:
    args = make_parser("python -m bench.sass", __doc__).parse_args()
    rows = reports(args.arch, args.only)
    if args.json:
        print(json.dumps([row._asdict() for row in rows]))
        return
    print(f"{'':33} instr/el special/el registers spills exchanges  once  loads; stores (bytes x number)")
    for row in rows:
        loads, stores = (" ".join(f"{w}x{n}" for w, n in counts.items()) for counts in (row.loads, row.stores))
        print(
            f"{row.arch:7}{row.variant:26} {row.instructions:8.2f} {row.special:10.2f} {row.registers:9} "
            f"{row.spills:6} {row.exchanges:9} {row.once:5}  {loads}; {stores}"
        )


if __name__ == "__main__":
    main()
