"""What the losses for Trainer, and the trainer itself, refuse, and with which sentences."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

from public import MODULES, SHAPE
from test_trainer_losses import OF_CLASSES, OF_SEVERAL, make_loss
from transformers import Trainer

import bertloss_fast as bf
from bertloss_fast.integrations.transformers import (
    FusedLossTrainer,
    ItemCounts,
    compute_loss_func,
    undo_fused_loss,
    use_fused_loss,
)
from tests.bert import arguments, multi_hot, rows_of, tiny

L = SHAPE[1]

MULTI_HOT = torch.zeros(4, L)
WRONG: dict[str, tuple[nn.Module, Any, Any, Any, str]] = {
    "no labels": (bf.ZlprLoss(), None, MULTI_HOT, 1, "labels: expected a tensor or SparseLabels, got NoneType"),
    "no logits": (bf.ZlprLoss(), MULTI_HOT, {"loss": 1}, 1, "outputs: expected logits .*, got the keys .'loss'."),
    "no tensor": (bf.ZlprLoss(), MULTI_HOT, ([1],), 1, "outputs: expected logits .* first in a tuple, got tuple"),
    "no count": (bf.ZlprLoss(), MULTI_HOT, MULTI_HOT, None, "num_items_in_batch: .* got None.*FusedLossTrainer counts"),
    "DataParallel": (bf.MSELoss(), MULTI_HOT, MULTI_HOT, torch.ones(2, 1), r"num_items_in_batch: .*got shape \(2, 1\)"),
    "other labels": (
        bf.BCEWithLogitsLoss(),
        MULTI_HOT,
        MULTI_HOT,
        ItemCounts(torch.tensor(4), 2),
        "num_items_in_batch: expected counts of 6 labels .*, got 2, which model.config.num_labels says",
    ),
    "fewer columns": (bf.ZlprLoss("sum"), MULTI_HOT[:, 1:].int(), MULTI_HOT, 1, "labels: expected shape .*each once"),
    "more columns": (bf.ZlprLoss("sum"), torch.zeros(4, L + 2).int(), MULTI_HOT, 1, r"labels: .* got \(4, 8\)"),
    "no such label": (
        bf.ZlprLoss("sum"),
        torch.tensor([[L]]),
        MULTI_HOT[:1],
        1,
        "labels: expected 0 <= label < 6, got 6 in row 0",
    ),
    "sparse classes": (
        bf.CrossEntropyLoss(),
        bf.SparseLabels.from_dense(MULTI_HOT),
        MULTI_HOT,
        1,
        "labels: expected a tensor for CrossEntropyLoss, got SparseLabels",
    ),
    "floats for classes": (
        bf.CrossEntropyLoss(),
        torch.zeros(4),
        MULTI_HOT,
        1,
        r"labels: expected integers, or probabilities of shape \(..., 6\), got floats of shape \(4,\)",
    ),
    "a list": (bf.ZlprLoss(), [[1]], MULTI_HOT, 1, "labels: expected a tensor or SparseLabels, got list"),
    "a text for a count": (
        bf.ZlprLoss(),
        MULTI_HOT,
        MULTI_HOT,
        "8",
        "num_items_in_batch: expected a number or a tensor, got str",
    ),
    "another ignored class": (
        bf.CrossEntropyLoss(ignore_index=-1),
        torch.zeros(4, dtype=torch.long),
        MULTI_HOT,
        torch.tensor(4),
        "expected a count of rows .*, got Trainer's, of labels that are not -100",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    loss, labels, outputs, count, message = WRONG[case]
    outputs = {"logits": outputs} if isinstance(outputs, Tensor) else outputs
    with pytest.raises((TypeError, ValueError), match=message):
        compute_loss_func(loss)(outputs, labels, count)


@pytest.mark.parametrize("name", MODULES)
def test_which_losses_are_taken(name: str) -> None:
    """Those of logits and labels."""
    taken = name in (*OF_SEVERAL, *OF_CLASSES, "MSELoss")
    if taken:
        assert compute_loss_func(make_loss(name, "mean"))
        if name != "TwoWayLoss":
            with pytest.raises(ValueError, match="loss: expected a reduction to one number, got reduction='none'"):
                compute_loss_func(make_loss(name, "none"))
        return
    with pytest.raises(TypeError, match=f"loss: expected one of bertloss_fast that takes .*, got {name}"):
        compute_loss_func(MODULES[name]())


def test_other_losses() -> None:
    with pytest.raises(TypeError, match=r"got torch.nn.BCEWithLogitsLoss; bertloss_fast.BCEWithLogitsLoss takes the"):
        compute_loss_func(nn.BCEWithLogitsLoss())
    with pytest.raises(TypeError, match=r"loss: .*got torch.nn.HuberLoss$"):
        compute_loss_func(nn.HuberLoss())
    with pytest.raises(ValueError, match="loss: expected no z_loss beside class weights"):
        compute_loss_func(bf.CrossEntropyLoss(torch.ones(L), z_loss=0.1))
    with pytest.raises(TypeError, match=r"loss: expected one that a linear layer takes in .*, got ZlprLoss"):
        compute_loss_func(bf.ZlprLoss()).of_layer(MULTI_HOT, MULTI_HOT, None, MULTI_HOT)


def test_wrong_labels_are_not_counted() -> None:
    """Of classes that there are none of, the loss says so; on a GPU an index beyond the weights would end all."""
    with pytest.raises(TypeError, match="labels: expected a tensor or SparseLabels, got list"):
        compute_loss_func(bf.ZlprLoss()).counts([[1]], L)
    loss = compute_loss_func(bf.CrossEntropyLoss(torch.full((L,), 2.0)))
    assert loss.counts(torch.tensor([1, L, -1, -100]), L).denominator == 6
    with pytest.raises(ValueError, match=r"target: expected classes from 0 to 5, .* got 6 at"):
        loss.of_logits(MULTI_HOT, torch.tensor([1, L, -1, -100]))


def make_trainer(folder: Path, loss: nn.Module | None, model: Any = None, **options: Any) -> Trainer:
    rows, given = rows_of(multi_hot(4)), None if loss is None else compute_loss_func(loss)
    model = tiny() if model is None else model
    return FusedLossTrainer(model, arguments(folder, **options), train_dataset=rows, compute_loss_func=given)


def test_wrong_trainers(tmp_path: Path) -> None:
    loss = bf.ZlprLoss(backend="eager")
    with pytest.raises(TypeError, match=r"compute_loss_func: expected what .* returns, or .*, got none"):
        make_trainer(tmp_path, None)
    with pytest.raises(TypeError, match=r"compute_loss_func: .*, got ZlprLoss"):
        FusedLossTrainer(tiny(), arguments(tmp_path), compute_loss_func=loss)
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0, .* got 0\.1"):
        make_trainer(tmp_path, loss, label_smoothing_factor=0.1)
    several_devices = arguments(tmp_path)
    several_devices._n_gpu = 2
    with pytest.raises(ValueError, match=r"n_gpu: expected one device a process .*, got 2"):
        FusedLossTrainer(tiny(), several_devices, compute_loss_func=compute_loss_func(loss))
    model = tiny()
    model.config.num_labels = 3
    with pytest.raises(ValueError, match=r"expected counts of 6 labels .*, got 3"):
        make_trainer(tmp_path, loss, model).train()
    model = tiny()
    del model.config
    with pytest.raises(ValueError, match=r"model\.config\.num_labels: expected the number of labels, got none"):
        make_trainer(tmp_path, loss, model)
    model = tiny()
    use_fused_loss(model, loss)
    with pytest.raises(ValueError, match="compute_loss_func: expected None with a model that use_fused_loss"):
        make_trainer(tmp_path, loss, model)
    trainer = make_trainer(tmp_path, None, model)
    undo_fused_loss(model)
    with pytest.raises(TypeError, match=r"compute_loss_func: expected .*, or a model that .* has patched, got none"):
        trainer.train()


def test_another_trainer_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which counts elsewhere: what is overridden would never be called."""
    monkeypatch.delattr(Trainer, "_get_num_items_in_batch")
    spec = importlib.util.find_spec(FusedLossTrainer.__module__)
    with pytest.raises(ImportError, match="transformers: expected a Trainer that counts in _get_num_items_in_batch"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
