"""The drop-ins on what torch tests its own losses with: values, gradients, and those of the targets.

A loss is in a table by the name that torch has for it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import TOLERANCE, uniform
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

import bertloss_fast as bf

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "binary_cross_entropy_with_logits": bf.binary_cross_entropy_with_logits,
    "cross_entropy": bf.cross_entropy,
    "kl_div": bf.kl_div,
    "linear_cross_entropy": bf.linear_cross_entropy,
    "mse_loss": bf.mse_loss,
}
MODULES: dict[str, type[nn.Module]] = {
    "BCEWithLogitsLoss": bf.BCEWithLogitsLoss,
    "CrossEntropyLoss": bf.CrossEntropyLoss,
    "KLDivLoss": bf.KLDivLoss,
    "MSELoss": bf.MSELoss,
}
OPS: dict[str, list[Any]] = {}  # of some there are several, which differ in their samples
for op in op_db:
    OPS.setdefault(op.name.removeprefix("nn.functional."), []).append(op)
INFOS = {info.module_cls.__name__: info for info in module_db}


class Sample(NamedTuple):
    """A call of torch's, and ours in its place."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    summed: Callable[..., Tensor]  # theirs with the reduction "sum"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def samples_of_a_function(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> Iterator[Sample]:
    def theirs(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
        """Without the options of linear_cross_entropy, which say how to compute it in 16 bits."""
        loss: Tensor = OPS[name][0].op(*args, **kwargs)
        return loss

    def summed(*args: Any, **kwargs: Any) -> Tensor:
        return theirs(*args, **{**kwargs, "reduction": "sum"})

    ours = functools.partial(FUNCTIONS[name], backend=backend)
    for op in OPS[name]:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            args = (sample.input, *sample.args)
            if name == "linear_cross_entropy" and args[1].dim() != 2:
                continue  # torch's losses of several dimensions: ours has none
            yield Sample(ours, theirs, summed, args, sample.kwargs)


def samples_of_a_module(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> Iterator[Sample]:
    info = INFOS[name]
    for sample in info.module_inputs_func(info, device, dtype, requires_grad=True, training=True):
        (args, kwargs), called = (sample.constructor_input.args, sample.constructor_input.kwargs), sample.forward_input
        ours = MODULES[name](*args, **kwargs, backend=backend).to(device, dtype)
        theirs, summed = (
            info.module_cls(*args, **{**kwargs, **options}).to(device, torch.float64)
            for options in ({}, {"reduction": "sum"})
        )
        yield Sample(ours, theirs, summed, called.args, called.kwargs)


def in_double(sample: Sample) -> Sample:
    """The same numbers in float64; what is one tensor stays one."""
    twins = {tensor: tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors_of(sample)}
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: twins.get(tensor, tensor), (sample.args, sample.kwargs))
    return sample._replace(args=args, kwargs=kwargs)


def tensors_of(sample: Sample) -> list[Tensor]:
    leaves = pytree.tree_leaves((sample.args, sample.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def value_and_grads(sample: Sample, call: Callable[..., Tensor]) -> list[Tensor]:
    """The loss, and the gradients of the tensors that ask for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of kl_div's mean
        loss = call(*sample.args, **sample.kwargs)
    leaves = [tensor for tensor in tensors_of(sample) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream(loss))]


def upstream(loss: Tensor) -> Tensor:
    return (uniform(*loss.shape, device=loss.device) + 0.5).bfloat16().to(loss.dtype)


def check(sample: Sample, roundings: int = 1) -> None:
    """``roundings`` of 16 bits lie between a sample's tensors and the logits."""
    exact = in_double(sample)
    ours, theirs = value_and_grads(sample, sample.ours), value_and_grads(exact, sample.theirs)
    if theirs[0].isnan().any() and not value_and_grads(exact, exact.summed)[0]:
        theirs = [torch.zeros_like(value) for value in theirs]  # the mean of nothing: 0 / 0 in torch, 0 here
    for found, true in zip(ours, theirs, strict=True):
        assert found.dtype == sample.args[0].dtype
        tolerance = TOLERANCE[found.dtype]
        if found.dtype != torch.float64:
            tolerance = tolerance | {"atol": 1e-6}  # of a probability less 1, times a weight up to 9
        if found.dtype.itemsize == 2 and roundings > 1:
            tolerance = dict.fromkeys(("rtol", "atol"), roundings * torch.finfo(found.dtype).eps)
        torch.testing.assert_close(
            found.double(), true, **tolerance, equal_nan=True, msg=lambda text: f"{text}\n{sample}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    samples = list(samples_of_a_function(name, dtype, backend, device))
    assert len(samples) > 4
    # A sample of a linear layer is one of its cross-entropy, behind a product of 8 numbers.
    for sample in samples[:: 4 if name.startswith("linear") and dtype.itemsize < 8 else 1]:
        check(sample, 8 if name.startswith("linear") else 1)


# Of cross-entropy torch has 105 samples, 35 of each reduction, which take the interpreter a minute: every fourth.
PARTS = [(name, slice(None, None, 4 if name == "CrossEntropyLoss" else 1)) for name in MODULES]
OTHERS = [("CrossEntropyLoss", slice(first, None, 4)) for first in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "part"), [*PARTS, *(pytest.param(*other, marks=pytest.mark.sweep) for other in OTHERS)]
)
def test_modules(name: str, part: slice, backend: str, device: torch.device) -> None:
    samples = list(samples_of_a_module(name, torch.float64, backend, device))
    assert len(samples) > 4
    for sample in samples[part]:
        check(sample)


def test_every_loss_of_torch_that_we_have_is_here() -> None:
    """A drop-in of one of torch's losses is called as that is."""
    assert FUNCTIONS.keys() == OPS.keys() & set(bf.__all__)
    assert MODULES.keys() == INFOS.keys() & set(bf.__all__)
