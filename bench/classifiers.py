"""Peak memory of a training step of a transformers classifier with many labels: unpatched, and by `use_fused_loss`.

``python -m bench.classifiers`` measures, each in a process of its own: a BERT, whose head's share is what a step takes
above that of the same model behind which no loss makes logits, with all gradients and all optimizer state; and a Llama,
which makes logits of every token, as a whole. Weights and tokens are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .memory import resident_bytes, step_peak_bytes

# What is freed goes back at once: glibc would keep some of it, more or less by chance.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
_IMPORTS = ("transformers.modeling_utils", "bertloss_fast.integrations.transformers", "bench.memory")
_LABELS_PER_ROW = 5
_STEPS = 2  # before the measured one: then gradients and optimizer state have their place


@dataclass(frozen=True)
class Sizes:
    """Of a model and its step."""

    model: str
    labels: int
    rows: int
    length: int
    features: int
    layers: int = 2


BERT, LLAMA = Sizes("Bert", 50_000, 256, 16, 384), Sizes("Llama", 50_000, 32, 128, 128)


class _NoHead(torch.autograd.Function):
    """Gradients as a head leaves them, of which none is computed from logits."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(tensor, 1e-6) for tensor in ctx.saved_tensors)


def classifier(sizes: Sizes) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{sizes.model}Config")(
        vocab_size=1000,
        hidden_size=sizes.features,
        intermediate_size=4 * sizes.features,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.features // 64),
        num_labels=sizes.labels,
        problem_type="multi_label_classification",
        pad_token_id=0,
    )
    return getattr(transformers, f"{sizes.model}ForSequenceClassification")(config).train()


def losses(sizes: Sizes, head: str) -> tuple[Any, Callable[[dict[str, Tensor]], Tensor]]:
    """From data to the loss."""
    from bertloss_fast.integrations.transformers import use_fused_loss
    from bertloss_fast.integrations.transformers.heads import bypass, identity
    from bertloss_fast.integrations.transformers.patch import patch_of

    model = classifier(sizes)
    if head == "unpatched":
        return model, lambda data: model(data["tokens"], labels=data["dense"]).loss
    use_fused_loss(model, fused_head=True)
    if head == "fused":
        return model, lambda data: model(data["tokens"], labels=data["labels"]).loss
    linear = model.get_submodule(patch_of(model).head)

    def without_head(data: dict[str, Tensor]) -> Tensor:
        with bypass(linear, identity):
            hidden = model(data["tokens"]).logits
        loss: Tensor = _NoHead.apply(hidden, *linear.parameters())
        return loss

    return model, without_head


def draw(sizes: Sizes) -> dict[str, Tensor]:
    """Tokens, and labels in both forms: a step holds both of them, whichever it reads."""
    labels = torch.randint(sizes.labels - _LABELS_PER_ROW, (sizes.rows, _LABELS_PER_ROW)).sort(dim=1).values
    labels += torch.arange(_LABELS_PER_ROW)
    dense = torch.zeros(sizes.rows, sizes.labels).scatter_(1, labels, 1.0).clone()  # a copy has all of its pages
    return {"tokens": torch.randint(1, 1000, (sizes.rows, sizes.length)), "labels": labels, "dense": dense}


def peak_bytes(sizes: Sizes, head: str) -> int:
    """Of a step in this process, above what was resident before there was a model."""
    classifier(replace(sizes, labels=2, features=64, layers=1))  # imports what it needs
    before = resident_bytes()
    data, (model, loss) = draw(sizes), losses(sizes, head)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # others take two of the weight's size to compute

    def step() -> None:
        optimizer.zero_grad()
        loss(data).backward()
        optimizer.step()

    for _ in range(_STEPS):
        step()
    return step_peak_bytes(step) - before


def measured(sizes: Sizes, heads: Sequence[str]) -> dict[str, int]:
    """Each peak in a process of its own, forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTS))
    with mock.patch.dict(os.environ, _MALLOC):
        forkserver.ensure_running()
    with context.Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(heads, pool.starmap(peak_bytes, [(sizes, head) for head in heads], chunksize=1), strict=True))


def head_share(peaks: dict[str, int]) -> float:
    """What the fused head takes, of what the unpatched one takes."""
    return (peaks["fused"] - peaks["no head"]) / (peaks["unpatched"] - peaks["no head"])


def whole_share(peaks: dict[str, int]) -> float:
    """Of the step's whole peak."""
    return peaks["fused"] / peaks["unpatched"]


CLAIMS = (
    (BERT, ("no head", "unpatched", "fused"), head_share, 0.25),
    (LLAMA, ("unpatched", "fused"), whole_share, 0.5),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.classifiers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller models with 20,000 labels")
    args = parser.parse_args(argv)
    all_hold = True
    for sizes, heads, share_of, limit in CLAIMS:
        if args.quick:
            sizes = replace(sizes, labels=20_000, features=64, layers=1)
        peaks = measured(sizes, heads)
        share = share_of(peaks)
        all_hold &= share <= limit
        mib = ", ".join(f"{head} {peak / 2**20:,.0f} MiB" for head, peak in peaks.items())
        of = "the head's extra memory" if share_of is head_share else "the whole peak"
        print(f"{sizes.model}, {sizes.labels:,} labels, {sizes.rows} x {sizes.length} tokens: {mib}")
        print(f"  {of}, fused of unpatched: {share:.3f}, at most {limit}: {'holds' if share <= limit else 'FAILS'}")
    return 0 if all_hold else 1


if __name__ == "__main__":
    raise SystemExit(main())
