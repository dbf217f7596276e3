"""Updates of a head without a gradient of its weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .functional.checks import check_fraction, check_index, check_number


class HeadSGD:
    """What :meth:`MultiLabelHead.fused_step` updates a head by: stochastic gradient descent, as ``torch.optim.SGD`` is.

    .. math::
        b \\leftarrow \\mu b + (g + \\lambda w), \\quad w \\leftarrow w - \\eta b

    In float32 and float64 that is all. Weights in bfloat16 are updated in float32 and rounded up or down at random, in
    proportion to what is nearer: small updates are not lost, since they arrive in the mean. The same seed gives the
    same bits, for the same chunks.

    Args:
        lr: the learning rate, eta, at least 0.
        momentum: mu, from 0 and less than 1; above 0 it takes the memory of another weight.
        weight_decay: lambda, at least 0.
        seed: of the rounding.

    All four are attributes that may be set between steps; the next step checks them.

    Example::

        >>> from bertloss_fast import HeadSGD
        >>> optimizer = HeadSGD(lr=0.1, momentum=0.9)
        >>> optimizer.lr *= 0.5
    """

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, seed: int = 0) -> None:
        self.lr, self.momentum, self.weight_decay, self.seed = lr, momentum, weight_decay, seed
        self._check()
        self._step = 0
        self._momenta: dict[str, Tensor] = {}

    def _check(self) -> None:
        check_number("lr", self.lr, 0)
        check_fraction("momentum", self.momentum)
        check_number("weight_decay", self.weight_decay, 0)
        _check_count("seed", self.seed)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: steps and momenta, by the parameters' names."""
        return {"step": self._step, **{f"momentum.{name}": momentum for name, momentum in self._momenta.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any device.

        Raises:
            TypeError, ValueError: if it is not one; nothing has changed then.
        """
        if not isinstance(state, dict) or "step" not in state:
            raise TypeError(f"state: expected what HeadSGD.state_dict gives, got {_keys(state)}")
        _check_count("step", state["step"])
        momenta = {name.removeprefix("momentum."): value for name, value in state.items() if name != "step"}
        for name, momentum in momenta.items():
            if f"momentum.{name}" not in state or not isinstance(momentum, Tensor) or not momentum.is_floating_point():
                raise TypeError(f"state: expected momenta of floating dtypes beside step, got {_keys(state)}")
        self._step, self._momenta = state["step"], {name: value.clone() for name, value in momenta.items()}

    def __repr__(self) -> str:
        return f"HeadSGD(lr={self.lr}, momentum={self.momentum}, weight_decay={self.weight_decay}, seed={self.seed})"

    def begin(self, parameters: dict[str, Tensor], shard: int = 0) -> Update:
        """A step, in which every element of the parameters is updated once."""
        self._check()
        for name, parameter in parameters.items():
            if parameter.dtype == torch.float16:
                raise TypeError(f"{name}: expected bfloat16, float32 or float64 to update, got float16")
            momentum = self._momenta.get(name)
            if self.momentum and momentum is not None and momentum.shape != parameter.shape:
                expected, got = tuple(parameter.shape), tuple(momentum.shape)
                raise ValueError(f"optimizer: expected the momenta of {name}, {expected}, got {got}")
        momenta = {}
        for name, parameter in parameters.items() if self.momentum else ():
            momentum, dtype = self._momenta.get(name), torch.promote_types(parameter.dtype, torch.float32)
            with torch.inference_mode(False):  # what outlives this step is an ordinary tensor
                fresh = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            momenta[name] = fresh if momentum is None else momentum.to(parameter.device, dtype)
        generator = None
        if any(parameter.dtype == torch.bfloat16 for parameter in parameters.values()):
            generator = torch.Generator(next(iter(parameters.values())).device)
            entropy = np.random.SeedSequence([self.seed, self._step, shard]).generate_state(1, np.uint64)
            generator.manual_seed(int(entropy[0] >> np.uint64(1)))
        return Update(self, parameters, momenta, generator)

    def end(self, momenta: dict[str, Tensor]) -> None:
        """Count a step that is over."""
        self._step += 1
        self._momenta.update(momenta)


class Update:
    """One step of a :class:`HeadSGD`."""

    def __init__(
        self,
        optimizer: HeadSGD,
        parameters: dict[str, Tensor],
        momenta: dict[str, Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self._optimizer, self._parameters, self._momenta, self._generator = optimizer, parameters, momenta, generator

    def labels(self, labels: slice, of_weight: Tensor, of_bias: Tensor | None) -> None:
        """Update some labels by their gradients, which may be written to."""
        self._update("weight", labels, of_weight)
        if of_bias is not None:
            self._update("bias", labels, of_bias)

    def end(self) -> None:
        self._optimizer.end(self._momenta)

    def _update(self, name: str, labels: slice, gradient: Tensor) -> None:
        if name not in self._parameters:  # it is frozen
            return
        optimizer, parameter = self._optimizer, self._parameters[name][labels]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        before, gradient = parameter.to(dtype), gradient.to(dtype)
        if optimizer.weight_decay:
            gradient.add_(before, alpha=optimizer.weight_decay)
        if optimizer.momentum:
            gradient = self._momenta[name][labels].mul_(optimizer.momentum).add_(gradient)
        if parameter.dtype == torch.bfloat16:
            parameter.copy_(rounded_at_random(before.add(gradient, alpha=-optimizer.lr), self._generator))
        else:
            parameter.add_(gradient, alpha=-optimizer.lr)


def rounded_at_random(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """float32 as bfloat16, up or down with a probability that makes the mean what it was."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    up_or_down = ((bits + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), up_or_down, values).bfloat16()


def _check_count(name: str, value: int) -> None:
    if check_index(name, value) < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value}")


def _keys(state: object) -> str:
    return f"a dict of {', '.join(map(str, state))}" if isinstance(state, dict) else type(state).__name__
