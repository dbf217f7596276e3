"""Launches of the ranking family's kernels, as ``launches.py`` has those of the others."""

from functools import partial
from typing import NamedTuple

import torch
from bertloss_fast.kernels import listwise, listwise_pairs

_empty = partial(torch.empty, device="meta")


class Ranking(NamedTuple):
    """A launch on lists of documents: of pairs of them, or of each list."""

    formula: str
    params: tuple[float, ...] = (1.0, 10.0, 1.44)
    length: int = 201
    inputs: torch.dtype = torch.float32
    k: int = 0
    mask: bool = True  # or all documents count
    step: str = "forward"  # which writes losses and gradients; "loss" the losses alone
    lists: int = 63

    def launch(self) -> None:
        compute_dtype = torch.float64 if self.inputs == torch.float64 else torch.float32
        shape = self.lists, self.length
        empty = partial(_empty, dtype=compute_dtype)
        index = _empty(shape, dtype=torch.int64)
        mask = _empty(shape, dtype=torch.bool) if self.mask else None
        losses, grads = empty(self.lists), empty(shape) if self.step == "forward" else None
        fast = self.inputs.itemsize == 2
        if self.formula == "adr_mse":
            listwise_pairs.adr_mse_launcher(
                self.params[:1], empty(shape), empty(shape), mask, losses, grads, grads, fast=fast
            )
        elif self.formula in listwise.FORMULAS:
            listwise.lists_launcher(
                self.formula,
                self.params[:2],
                _empty(shape, dtype=self.inputs),
                _empty(shape, dtype=torch.int64) if self.formula == "list_net" else None,
                mask,
                index if self.formula.endswith("mle") else None,
                empty(shape) if self.formula == "p_list_mle" else None,
                losses,
                grads,
            )
        else:
            counts = _empty(self.lists, dtype=torch.int64) if self.mask else None
            parts = empty(self.lists, listwise_pairs.num_parts(self.length))
            listwise_pairs.ranked_launcher(
                self.formula,
                self.params,
                self.k,
                empty(shape),
                empty(shape),
                counts,
                index,
                empty(self.length),
                empty(self.length),
                parts,
                grads,
                fast=fast,
            )
