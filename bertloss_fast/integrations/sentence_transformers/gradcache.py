"""GradCache: a batch's scores without its graph, for losses whose batches are larger than the memory.

The model scores the batch twice, a mini-batch at a time: first without a graph, so that the loss of all scores and
its gradient can be computed; then, in backward, with one, and each mini-batch's share of that gradient runs through
it before the next is scored. What is random, dropout, is the same both times.

Follows Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021 (arXiv:2101.06983).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .base import predict

Features = dict[str, Any]


def cached_scores(model: Any, batches: Iterable[Features], progress: partial[Any]) -> Tensor:
    """The scores of all mini-batches of a model of one label, ``[N]``.

    No graph hangs on them but a hook: what backward brings to the scores goes on into the model's parameters there.
    ``progress`` is put around what is iterated over.
    """
    with_gradient = torch.is_grad_enabled()
    devices = {parameter.device for parameter in model.parameters()}
    parts: list[Tensor] = []
    first_pass: list[tuple[Features, Surroundings]] = []
    with torch.no_grad():
        for features in progress(batches):
            if with_gradient:
                first_pass.append((features, Surroundings(devices)))
            parts.append(predict(model, features).squeeze(1))
    scores = torch.cat(parts)
    if with_gradient:
        sizes = [len(part) for part in parts]
        hook = partial(_second_pass, model, first_pass, sizes, progress)
        scores.requires_grad_().register_hook(hook)  # type: ignore[no-untyped-call]
    return scores


def _second_pass(
    model: Any,
    first_pass: Sequence[tuple[Features, Surroundings]],
    sizes: list[int],
    progress: partial[Any],
    gradient: Tensor,
) -> None:
    """Scores every mini-batch again, with a graph, and sends its share of the gradient through it."""
    shares = torch.split(gradient, sizes)
    for index, (features, surroundings) in enumerate(progress(first_pass)):
        is_last = index == len(first_pass) - 1
        with _processes_in_step(model, is_last), torch.enable_grad():
            with surroundings.restored():
                scores = predict(model, features).squeeze(1)
            if scores.requires_grad:  # unless all of the model is frozen
                torch.autograd.backward(scores, shares[index])


def _processes_in_step(model: Any, is_last: bool) -> AbstractContextManager[None]:
    """DistributedDataParallel's processes add up their gradients once, with the last mini-batch."""
    wrapped = getattr(model, "_orig_mod", model)  # of torch.compile
    if is_last or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


class Surroundings:
    """The random generators of some devices, and their autocast, as they are now."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._states = {device: _module(device).get_rng_state(*_index(device)) for device in devices - {_CPU}}
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {device.type for device in devices}
        }

    def _set_generators(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._states.items():
            _module(device).set_rng_state(state, *_index(device))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As they were then, and afterwards as they were before."""
        before = Surroundings({_CPU, *self._states})
        with ExitStack() as stack:
            stack.callback(before._set_generators)
            for kind, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            self._set_generators()
            yield


_CPU = torch.device("cpu")


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Which of its kind a device is; there is but one of Apple's."""
    return () if device.type == "mps" else (device,)
