"""A classifier of transformers whose own loss is one of ours: the instance is given a class made from its own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...modules import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from ...modules.softmax import ClassLoss
from ...targets import SparseLabels
from .counting import Labels
from .heads import bypass, find_head, head_of, identity, matrix_of, restore_head
from .losses import ItemCounts, TrainerLoss, check_labels, check_loss

_MULTI, _SINGLE, _REGRESSION = "multi_label_classification", "single_label_classification", "regression"
# What transformers takes for each type of problem.
_OWN: dict[str, type[nn.Module]] = {_MULTI: BCEWithLogitsLoss, _SINGLE: CrossEntropyLoss, _REGRESSION: MSELoss}
_NAME = "_bertloss_fast"


class Patch:
    """What a patched model carries: the loss it was given, or else the one for its problem type."""

    def __init__(self, config: Any, loss: nn.Module | None) -> None:
        self.config, self.problem_type = config, config.problem_type
        self.head: str | None = None  # the name of the linear layer that the loss takes in
        self.problem = _problem_of(config) if loss is None else _problem_for(loss, config.problem_type)
        if loss is None and self.problem is not None:
            loss = _OWN[self.problem]()
        self.loss = None if loss is None else TrainerLoss(loss)

    def loss_for(self, labels: Labels) -> TrainerLoss:
        """The loss, which the first labels decide on where nothing else has said what they are."""
        if self.loss is None:
            self.problem = _problem_by(labels)
            self.loss = TrainerLoss(_OWN[self.problem]())
        if self.config.problem_type is None:  # as transformers does; pipelines tell by it what to make of logits
            self.config.problem_type = self.problem
        return self.loss

    def counts(self, labels: Labels, num_labels: int) -> ItemCounts:
        return self.loss_for(check_labels(labels)).counts(labels, num_labels)


class Undo:
    """Takes a patch off its model: when called, or as a context manager at the end. Further calls do nothing."""

    def __init__(self, model: Any) -> None:
        self._model, self._patch = model, model.__dict__[_NAME]

    def __call__(self) -> None:
        if self._model.__dict__.get(_NAME) is self._patch:
            undo_fused_loss(self._model)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self()


def use_fused_loss(model: PreTrainedModel, loss: nn.Module | None = None, fused_head: bool = False) -> Undo:
    """Make a loss of ours the own loss of a sequence classifier: of this instance, until it is undone.

    A call with labels gives what it gave, with this loss in its place, which divides as transformers' ``Trainer`` asks
    for by ``num_items_in_batch``, so that accumulated batches are one large one; without that, by what is in the batch.
    A call without labels is the model's own. State dict, signature and what is saved stay the same. Copies and
    pickles of the model have the loss too.

    Args:
        model: any sequence classifier of transformers, whether its loss is in its ``forward`` or in ``loss_function``.
        loss: what :func:`compute_loss_func` takes; ``None`` for that of ``config.problem_type``
            (:class:`~bertloss_fast.BCEWithLogitsLoss`, :class:`~bertloss_fast.CrossEntropyLoss` or
            :class:`~bertloss_fast.MSELoss`), which is inferred from the first labels where it is ``None`` too.
        fused_head: take the linear layer that the model ends with into the loss, so that the logits of a batch are
            never held: in training the output's ``logits`` are ``None``. Models that give each token logits first, as
            Llama does, choose the token's hidden state instead. The loss must be one that
            :class:`~bertloss_fast.MultiLabelHead` takes, a ``CrossEntropyLoss`` or a ``SoftmaxFocalLoss``.

    Returns:
        What takes it off again: call it, or use it as a context manager. :func:`undo_fused_loss` does so without it.

    Raises:
        TypeError, ValueError: for a model or a loss that this cannot be done with; the model is as it was then.

    Example::

        >>> import torch, transformers
        >>> from bertloss_fast import SigmoidFocalLoss
        >>> from bertloss_fast.integrations.transformers import use_fused_loss
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_labels=1000)
        >>> model = transformers.BertForSequenceClassification(config)
        >>> undo = use_fused_loss(model, SigmoidFocalLoss(reduction="batchmean"), fused_head=True)
        >>> model(torch.tensor([[1, 2]]), labels=torch.tensor([[3, 999, -100]])).loss.backward()
        >>> undo()
    """
    _check_model(model)
    if not isinstance(fused_head, bool):
        raise TypeError(f"fused_head: expected True or False, got {type(fused_head).__name__}")
    patch = Patch(model.config, loss)
    if fused_head:
        if patch.loss is not None:
            patch.loss.check_layer()
        patch.head = find_head(model)
    model.__dict__[_NAME] = patch
    model.__class__ = _patched(model.__class__)
    return Undo(model)


def undo_fused_loss(model: PreTrainedModel) -> None:
    """Take off what :func:`use_fused_loss` has put on a model, be it a copy or an unpickled one.

    Raises:
        ValueError: for a model without such a loss.

    Example::

        >>> import copy, transformers
        >>> from bertloss_fast.integrations.transformers import undo_fused_loss, use_fused_loss
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_hidden_layers=1))
        >>> undo = use_fused_loss(model)
        >>> undo_fused_loss(copy.deepcopy(model))
    """
    patch = patch_of(model)
    if patch is None:
        raise ValueError(f"model: expected one that use_fused_loss has patched, got a {type(model).__name__} without")
    model = _unwrapped(model)
    del model.__dict__[_NAME]
    if patch.head is not None:
        for module in model.modules():  # under whatever name it is now: an adapter may have taken it in
            restore_head(module)
    if model.config.problem_type == patch.problem:  # and nobody has set another
        model.config.problem_type = patch.problem_type
    if "_unpatched" in type(model).__dict__:  # another class may have been put over it: then it does nothing
        model.__class__ = type(model)._unpatched


def patch_of(model: Any) -> Patch | None:
    """What a patched model carries, also one that peft has wrapped; None of another."""
    return getattr(_unwrapped(model), _NAME, None)


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@functools.cache
def _patched(unpatched: Any) -> Any:
    """A class like the model's, of the same name, since transformers saves that; pickles name the model's own."""
    original = unpatched.forward
    signature = inspect.signature(original)
    place = list(signature.parameters).index("labels") - 1

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _NAME not in self.__dict__:  # undone, and something has kept this method
            return original(self, *args, **kwargs)
        labels = kwargs.pop("labels", None)
        if len(args) > place:
            labels, args = args[place], (*args[:place], None, *args[place + 1 :])
        number = kwargs.pop("num_items_in_batch", None)
        call = functools.partial(original, self, *args, **kwargs)
        if labels is not None:
            return _with_loss(self, call, labels, number)
        if number is not None:
            raise ValueError(
                "labels: expected some beside num_items_in_batch, got None; Trainer's compute_loss_func and "
                "label_smoothing_factor keep labels from the model: use either of these or use_fused_loss"
            )
        return call()

    # accelerate takes its wrappers off by following __wrapped__, and must not go further than to this.
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = signature  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:
        return _unpickled, (unpatched,), *super(patched, self).__reduce_ex__(protocol)[2:]

    like = {name: getattr(unpatched, name) for name in ("__module__", "__qualname__", "__doc__")}
    # By accepts_loss_kwargs Trainer knows that the loss is divided by the number that it gives.
    own = {"forward": forward, "accepts_loss_kwargs": True, "__reduce_ex__": reduce, "_unpatched": unpatched}
    patched: Any = type(unpatched)(unpatched.__name__, (unpatched,), {**like, **own})
    return patched


def _unpickled(unpatched: Any) -> Any:
    patched = _patched(unpatched)
    return patched.__new__(patched)


def _with_loss(model: Any, call: Callable[[], Any], labels: Labels, number: Any) -> Any:
    """What a call without labels gives, and the loss with it."""
    patch: Patch = model.__dict__[_NAME]
    loss = patch.loss_for(check_labels(labels))
    if patch.head is None:
        output = call()
        logits = matrix_of(output, model.config.num_labels)
        return _with(output, loss.of_logits(logits, labels.to(logits.device), number), logits)
    linear = head_of(model, patch.head)
    with bypass(linear, identity):
        output = call()
    hidden = matrix_of(output, linear.in_features)
    labels = labels.to(hidden.device)
    if model.training:
        return _with(output, loss.of_layer(hidden, linear.weight, linear.bias, labels, number), None)
    logits = linear(hidden)
    return _with(output, loss.of_logits(logits, labels, number), logits)


def _with(output: Any, loss: Tensor, logits: Tensor | None) -> Any:
    if isinstance(output, tuple):
        return loss, logits, *output[1:]
    return dataclasses.replace(output, loss=loss, logits=logits)


def _problem_of(config: Any) -> str | None:
    """The type of a problem, which labels may have to tell: transformers' rule."""
    if config.problem_type is None:
        return _REGRESSION if config.num_labels == 1 else None
    if config.problem_type not in _OWN:
        expected = f"one of {', '.join(_OWN)} or None"
        raise ValueError(f"model.config.problem_type: expected {expected}, got {config.problem_type!r}")
    return str(config.problem_type)


def _problem_by(labels: Labels) -> str:
    """By labels: transformers' rule, and for all that are labels here."""
    if isinstance(labels, SparseLabels) or labels.is_floating_point() or labels.dtype == torch.bool:
        return _MULTI
    if labels.dim() == 2 and labels.shape[1] == 1:
        expected = "one, since integers of shape (N, 1) may be classes or lists of one label"
        raise ValueError(f"model.config.problem_type: expected {expected}, got None")
    return _SINGLE if labels.dim() == 1 else _MULTI


def _problem_for(loss: nn.Module, asked: str | None) -> str:
    """The type of problem that a loss is for, which is the one asked for."""
    check_loss(loss)
    problem = _REGRESSION if isinstance(loss, MSELoss) else _SINGLE if isinstance(loss, ClassLoss) else _MULTI
    if asked not in (None, problem):
        raise ValueError(f"loss: expected one for {asked!r}, model.config.problem_type; got {type(loss).__name__}")
    return problem


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a model of transformers, not what wraps or compiles one; got {type(model).__name__}"
        )
    if _NAME in model.__dict__:
        raise ValueError(
            "model: expected one without a loss of use_fused_loss, got one that has it; undo_fused_loss takes it off"
        )
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise TypeError(f"model: expected a sequence classifier, got {type(model).__name__}, which takes no labels")
    if "forward" in model.__dict__:
        raise ValueError(
            "model: expected its class's own forward, got another put over it; "
            "call use_fused_loss before accelerate or others prepare the model"
        )
