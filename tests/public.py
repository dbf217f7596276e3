"""Every public loss, by the family that it is of. A new loss is here when it is public: it needs no line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from cases import logits, uniform
from torch import Tensor, nn

import bertloss_fast as bf
from bertloss_fast import functional, modules

SHAPE = (4, 6)
# What cannot have a default, of the losses that have such arguments.
NEEDED = {"class_counts": [60, 30, 9, 3, 1, 0], "num_samples": 100, "counts": [60, 30, 9, 3, 1, 0]}


def needed(function: Any) -> dict[str, Any]:
    """Those arguments, and a reduction to a scalar."""
    parameters = inspect.signature(function).parameters
    fixed = {name: NEEDED[name] for name in parameters if name in NEEDED}
    return fixed | ({"reduction": "mean"} if "reduction" in parameters else {})


def is_loss(function: Any) -> bool:
    return "reduction" in inspect.signature(function).parameters


FUNCTIONS = {name: getattr(functional, name) for name in functional.__all__ if is_loss(getattr(functional, name))}
MODULES = {
    name: value
    for name, value in vars(bf).items()
    if isinstance(value, type) and name in bf.__all__ and value.__module__.startswith(modules.__name__)
}
Given = tuple[Any, ...]


def one_of_each(losses: dict[str, Any]) -> set[str]:
    """The first loss of every file and kind of targets: for what costs seconds, and is the same for those after it."""
    firsts = {(loss.__module__, *forms(loss)): name for name, loss in reversed(losses.items())}
    return set(firsts.values())


def labels(rows: int, device: torch.device) -> Tensor:
    """Dense labels of several classes."""
    return uniform(rows, SHAPE[1], device=device, seed=3) < 0.4


def classes(rows: int, device: torch.device) -> Tensor:
    """One class a row, one of them for none."""
    made = torch.arange(rows, device=device) % SHAPE[1]
    made[1] = -100
    return made


def from_labels(loss: Any, y: Tensor) -> Given:
    """What comes after the logits, made of dense labels: they differ from batch to batch."""
    family = loss.__module__.rpartition(".")[2]
    if FORMS[family] is OF_SEVERAL:
        return (y,)
    first = y.int().argmax(-1)
    distribution = (3 * y.double()).softmax(-1)
    return {
        "softmax": (first,),
        "distillation": (distribution, first)[: len(forms(loss)["dense"](len(y), y.device))],
        "pointwise": (distribution,),
        "listwise": (y.int(),) if "labels" in names_of(loss) else (),
    }[family]


def names_of(loss: Any) -> list[str]:
    """What a function or module is called with."""
    call = loss.forward if isinstance(loss, type) else loss
    return [name for name in inspect.signature(call).parameters if name != "self"]


def call(module: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    loss: Tensor = module(x, *from_labels(type(module), y), **options)
    return loss


def distributions(rows: int, device: torch.device) -> Tensor:
    return logits(rows, SHAPE[1], device=device, seed=4).detach().softmax(-1)


def relevance(rows: int, device: torch.device) -> Tensor:
    """Graded labels of documents, equal ones among them."""
    return (4 * uniform(rows, SHAPE[1], device=device, seed=6)).floor()


# What comes after the logits, by the family that a function or module is of, whose file has its name.
OF_SEVERAL: dict[str, Callable[[int, torch.device], Given]] = {
    "dense": lambda rows, device: (labels(rows, device),),
    "sparse": lambda rows, device: (bf.SparseLabels.from_dense(labels(rows, device)),),
}
FORMS: dict[str, dict[str, Callable[[int, torch.device], Given]]] = {
    "sigmoid": OF_SEVERAL,
    "imbalance": OF_SEVERAL,
    "rowwise": OF_SEVERAL,
    "softmax": {"dense": lambda rows, device: (classes(rows, device),)},
    "distillation": {
        "dense": lambda rows, device: (distributions(rows, device), classes(rows, device)),
        "alone": lambda rows, device: (distributions(rows, device),),
    },
    "pointwise": {"dense": lambda rows, device: (distributions(rows, device),)},
    "listwise": {"dense": lambda rows, device: (relevance(rows, device),)},
}


def with_weight(form: Callable[[int, torch.device], Given]) -> Callable[[int, torch.device], Given]:
    """Behind the weight of a layer."""
    return lambda rows, device: (logits(SHAPE[1], SHAPE[1], device=device, seed=5).detach() / 4, *form(rows, device))


# Those of a linear layer are called with hidden states in the logits' place.
LINEAR = {
    "labels": {form: with_weight(given) for form, given in OF_SEVERAL.items()},
    "classes": {form: with_weight(given) for form, given in FORMS["softmax"].items()},
}


def forms(loss: Any) -> dict[str, Callable[[int, torch.device], Given]]:
    """Those that a loss takes."""
    family = loss.__module__.rpartition(".")[2]
    if family == "linear":
        takes_classes = "softmax" in loss.__name__ or loss.__name__ == "linear_cross_entropy"
        return LINEAR["classes" if takes_classes else "labels"]
    of_family = FORMS[family]
    if family == "listwise" and "labels" not in names_of(loss):
        return {"dense": lambda rows, device: ()}
    if of_family is not FORMS["distillation"]:
        return of_family
    takes_classes = names_of(loss)[2:3] == ["targets"]
    return {"dense": of_family["dense" if takes_classes else "alone"]}
