"""One training step of BERT-base with a head of up to millions of labels on a GPU: its memory, and its time.

``make gpu-xmc`` runs it. Tokens and labels are random; weights too, from a config: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from bertloss_fast import HeadSGD, MultiLabelHead, SigmoidFocalLoss, SparseLabels

from .results import environment

# Labels, rows, and peaks that others have published for such a step with an encoder of this size, in GiB: ELMO in
# bfloat16, and Renee (both in the tables of arXiv:2510.11168).
PUBLISHED = {670091: (256, 5.7, 11.9), 2812281: (128, 10.4, 39.7)}
_LENGTH, _LABELS_PER_ROW = 128, 5
_WARM_UP, _STEPS = 3, 10


@dataclass
class Step:
    """What was found about one number of labels."""

    labels: int
    rows: int
    peak_gib: float | None  # on a GPU
    step_ms: float
    head_ms: float
    head_tflops: float  # over 6 B L D operations
    matmul_tflops: float  # of one large product in bfloat16, in the same run
    elmo_gib: float | None
    renee_gib: float | None


def measure(labels: int, rows: int, device: torch.device, *, layers: int = 12, features: int = 768) -> Step:
    """A step: the encoder under autocast with AdamW, the head in bfloat16 with its own fused update."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": features, "intermediate_size": 4 * features}
    encoder = BertModel(BertConfig(**sizes, num_attention_heads=features // 64)).to(device)
    of_encoder = torch.optim.AdamW(encoder.parameters(), 1e-5, fused=device.type == "cuda")
    head = MultiLabelHead(
        features, labels, SigmoidFocalLoss(reduction="batchmean"), device=device, dtype=torch.bfloat16
    )
    of_head = HeadSGD(0.01)
    tokens = torch.randint(30522, (rows, _LENGTH), device=device)
    drawn = torch.randint(labels - _LABELS_PER_ROW, (rows, _LABELS_PER_ROW)).sort(dim=1).values
    targets = SparseLabels.from_padded(drawn + torch.arange(_LABELS_PER_ROW), labels).to(device)

    def encode() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden: Tensor = encoder(tokens).last_hidden_state[:, 0].bfloat16()
        return hidden

    def whole() -> None:
        of_encoder.zero_grad()
        hidden = encode()
        _, gradient = head.fused_step(hidden, targets, of_head)
        hidden.backward(gradient)
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        of_encoder.step()

    step_seconds = _seconds(whole, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    hidden = encode().detach()
    head_seconds = _seconds(lambda: head.fused_step(hidden, targets, of_head), device)
    _, elmo, renee = PUBLISHED.get(labels, (rows, None, None))
    return Step(
        labels,
        rows,
        peak,
        1e3 * step_seconds,
        1e3 * head_seconds,
        6 * rows * labels * features / head_seconds / 1e12,
        _matmul_tflops(device),
        elmo,
        renee,
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of some calls after others."""
    times = []
    for number in range(_WARM_UP + _STEPS):
        if device.type == "cuda":
            if number == _WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[_WARM_UP:])


def _matmul_tflops(device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device) / 1e12


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.xmc", description=__doc__)
    parser.add_argument("--labels", type=int, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--rows", type=int, help="default: as published, else 128")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="folder of xmc.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    steps = []
    for labels in args.labels:
        rows = args.rows or PUBLISHED.get(labels, (128,))[0]
        step = measure(labels, rows, device, layers=args.layers, features=args.features)
        steps.append(asdict(step))
        print(
            f"{labels:,} labels, {rows} rows: peak {step.peak_gib or 0:.1f} GiB (published: ELMO {step.elmo_gib}, "
            f"Renee {step.renee_gib}), step {step.step_ms:.0f} ms, head {step.head_ms:.0f} ms, "
            f"{step.head_tflops:.1f} of {step.matmul_tflops:.1f} TFLOP/s"
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(device, False), "steps": steps}
        (args.out / "xmc.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
