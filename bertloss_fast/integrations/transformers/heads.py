"""The linear layer that a classifier ends with, made one that can be bypassed, so that a loss can take it in.

While it passes its input through, what the model does to logits (pooling, at most) it does to hidden states, and these
come out in their place. That nothing else happens there is tried when the layer is looked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from .losses import logits_of


class _OfThread(threading.local):
    linear: nn.Module | None = None
    function: Callable[[Tensor], Tensor] | None = None


_OF_THREAD = _OfThread()


class BypassableLinear(nn.Linear):
    """An ``nn.Linear`` that a function may be called in place of: in one thread, until a call ends."""

    def forward(self, input: Tensor) -> Tensor:
        if _OF_THREAD.linear is self and _OF_THREAD.function is not None:
            return _OF_THREAD.function(input)
        return super().forward(input)

    def _get_name(self) -> str:
        return "Linear"


@contextmanager
def bypass(linear: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = _OF_THREAD.linear, _OF_THREAD.function
    _OF_THREAD.linear, _OF_THREAD.function = linear, function
    try:
        yield
    finally:
        _OF_THREAD.linear, _OF_THREAD.function = before


def identity(hidden: Tensor) -> Tensor:
    return hidden


def head_of(model: nn.Module, name: str) -> BypassableLinear:
    """The layer of this name: looked up at each call, for copies and replicas have their own."""
    linear = model.get_submodule(name)
    if not isinstance(linear, BypassableLinear):
        raise TypeError(
            f"{name}: expected the linear layer that use_fused_loss found there, got {type(linear).__name__}; "
            "call use_fused_loss after what replaced it"
        )
    return linear


def matrix_of(output: Any, width: int) -> Tensor:
    """The logits ``[N, width]`` of an output that came without a loss."""
    logits = logits_of(output)
    if logits.dim() != 2 or logits.shape[1] != width:
        raise ValueError(f"model: expected logits of shape (N, {width}), got {tuple(logits.shape)}")
    return logits


def find_head(model: Any) -> str:
    """The name of a model's last linear layer, which from now on can be bypassed; or a ValueError."""
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("model: expected parameters with values, got some on the meta device; load them first")
    inputs = {"input_ids": _token_ids(model)}
    with _quiet(model):
        name = _last_linear(model, inputs)
        linear = model.get_submodule(name)
        linear.__class__ = BypassableLinear
        try:
            _check_nothing_follows(model, linear, name, inputs)
        except BaseException:
            restore_head(linear)
            raise
    return name


def restore_head(linear: nn.Module) -> None:
    if type(linear) is BypassableLinear:
        linear.__class__ = nn.Linear  # type: ignore[assignment]


def _token_ids(model: Any) -> Tensor:
    """Three ordinary tokens and the end, which T5 and BART look for."""
    config = model.config.get_text_config()
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    special = {end, getattr(config, "pad_token_id", None)}
    ordinary = islice((token for token in range(getattr(config, "vocab_size", 0)) if token not in special), 3)
    return torch.tensor([[*ordinary, *([] if end is None else [end])]], device=model.device)


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Evaluation without gradients or autocast, after which flags and random numbers are as before."""
    training = [(module, module.training) for module in model.modules()]
    device = model.device
    devices = [] if device.type == "cpu" else [device]
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, flag in training:
            module.training = flag


def _try(model: Any, inputs: dict[str, Tensor], expected: str) -> Any:
    try:
        return model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"model: expected {expected}, got {error!r}") from error


def _last_linear(model: Any, inputs: dict[str, Tensor]) -> str:
    """The one of as many outputs as labels that a call of the model reaches last."""
    labels, called = model.config.num_labels, []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.out_features == labels
    ]
    try:
        matrix_of(_try(model, inputs, "one that fused_head=True can try on a few tokens"), labels)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"model: expected an nn.Linear of {labels} outputs, one a label, at its end, got none; "
            "adapted (LoRA) and quantized layers are not supported"
        )
    if called.count(called[-1]) > 1:
        raise ValueError(
            f"model: expected one call of {called[-1]}, its last linear layer, got {called.count(called[-1])}"
        )
    return cast(str, called[-1])


def _check_nothing_follows(model: Any, linear: nn.Module, name: str, inputs: dict[str, Tensor]) -> None:
    """That the logits are what the layer gives, and the hidden states in their place what it is given.

    Tried with other values in the layer's place: its own, which may be zero, could hide a difference. They are an outer
    product, which needs no memory of the weight's size.
    """
    weight: Any = linear.weight
    draw = torch.Generator().manual_seed(0)
    features = weight.shape[1]
    of_input, of_output, shift = (
        torch.randn(size, generator=draw).to(weight) for size in (features, len(weight), len(weight))
    )

    def layer(hidden: Tensor) -> Tensor:
        logits: Tensor = (hidden @ of_input)[..., None] * of_output / features**0.5
        return logits if linear.bias is None else logits + shift

    wanted = f"logits that are the output of {name}, its last linear layer"
    with bypass(linear, layer):
        expected = logits_of(_try(model, inputs, wanted))
    with bypass(linear, identity):
        hidden = logits_of(_try(model, inputs, f"{wanted}, and its input to come out in their place"))
    accuracy = torch.finfo(weight.dtype).eps ** 0.5
    if hidden.shape != (len(expected), features) or not torch.allclose(
        layer(hidden), expected.to(hidden), rtol=accuracy, atol=accuracy
    ):
        raise ValueError(f"model: expected {wanted}, got others")
