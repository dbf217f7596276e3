"""What a patched model must leave as it was, and what it must go through: undone, copied, saved, wrapped."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

import transformers
from architectures import INPUTS, LABELS, MULTI, MULTI_HOT, SINGLE, TARGETS, check_gradients, classifier, step
from processes import data_parallel_alone

import bertloss_fast
from bertloss_fast import SparseLabels
from bertloss_fast.integrations.transformers import undo_fused_loss, use_fused_loss
from bertloss_fast.integrations.transformers.collator import padded

pytestmark = pytest.mark.usefixtures("one_thread", "eager")


def model_and_loss():
    model = classifier("Bert", LABELS, problem_type=MULTI).eval()
    return model, model(**INPUTS, labels=TARGETS[MULTI]).loss


def test_undone_as_if_nothing_had_been():
    model, own = model_and_loss()
    kind, linear, attributes = type(model), type(model.classifier), vars(model).keys()
    model.config.problem_type = None
    undo = use_fused_loss(model, fused_head=True)
    torch.testing.assert_close(model(**INPUTS, labels=TARGETS[MULTI]).loss, own)
    assert model.config.problem_type == MULTI
    undo()
    assert (type(model), type(model.classifier), vars(model).keys()) == (kind, linear, attributes)
    assert not hasattr(model, "accepts_loss_kwargs")
    assert model.config.problem_type is None
    use_fused_loss(model)
    model(**INPUTS, labels=TARGETS[MULTI])
    model.config.problem_type = SINGLE
    undo_fused_loss(model)
    assert model.config.problem_type == SINGLE, "which another has set"


def test_undone_in_any_order():
    (model, own), (other, _) = model_and_loss(), model_and_loss()
    labels, kind = TARGETS[MULTI], type(model)
    first, second = use_fused_loss(model, bertloss_fast.ZlprLoss()), use_fused_loss(other, fused_head=True)
    first()
    assert torch.equal(model(**INPUTS, labels=labels).loss, own)
    torch.testing.assert_close(other(**INPUTS, labels=labels).loss, own)
    again = use_fused_loss(model, bertloss_fast.ZlprLoss())
    first()  # of a patch that is no more
    assert not torch.equal(model(**INPUTS, labels=labels).loss, own)
    second()
    again()
    again()
    assert type(other) is type(model) is kind


def test_undone_under_a_method_that_was_taken():
    """As accelerate takes it: what is left is a model that works."""
    model, own = model_and_loss()
    undo = use_fused_loss(model, bertloss_fast.ZlprLoss())
    model.forward = model.forward.__func__.__get__(model)
    assert not torch.equal(model(**INPUTS, labels=TARGETS[MULTI]).loss, own)
    undo()
    assert torch.equal(model(**INPUTS, labels=TARGETS[MULTI]).loss, own)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_the_loss_and_their_own_layer(copied):
    model = classifier("Llama", LABELS)
    undo = use_fused_loss(model, fused_head=True)
    twin = copied(model)
    undo()
    with torch.no_grad():
        twin.score.weight.mul_(2)
    got, gradients = step(twin, INPUTS, labels=TARGETS[MULTI])
    assert got.logits is None
    assert type(model.score) is nn.Linear
    with torch.no_grad():
        model.score.weight.mul_(2)
    expected, own = step(model, INPUTS, labels=TARGETS[MULTI])
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    check_gradients(gradients, own)
    assert twin.config.problem_type == MULTI
    undo_fused_loss(twin)
    assert (type(twin), type(twin.score)) == (type(model), nn.Linear)
    assert step(twin, INPUTS, labels=TARGETS[MULTI])[0].logits.shape == (4, LABELS)


def test_saved_and_loaded_as_before(tmp_path):
    model = classifier("Bert", LABELS, problem_type=MULTI).eval()
    keys, shown = model.state_dict().keys(), repr(model)
    use_fused_loss(model, bertloss_fast.DistributionBalancedLoss([9, 8, 7, 6, 5], 20))
    assert model.state_dict().keys() == keys
    assert repr(model) == shown
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.BertForSequenceClassification
    assert torch.equal(loaded(**INPUTS).logits, model(**INPUTS).logits)
    use_fused_loss(loaded, fused_head=True)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.config.architectures == ["BertForSequenceClassification"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_under_checkpointing(name):
    model = classifier(name, LABELS, problem_type=MULTI)
    checkpointing = "activation_checkpointing_enable"  # its name in transformers 5
    getattr(model, checkpointing, model.gradient_checkpointing_enable)({"use_reentrant": False})
    expected, gradients = step(model, INPUTS, labels=TARGETS[MULTI])
    use_fused_loss(model, fused_head=True)
    got, found = step(model, INPUTS, labels=TARGETS[MULTI])
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    check_gradients(found, gradients)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
@torch.autocast("cpu", torch.bfloat16)
def test_under_autocast(name):
    """bfloat16 has 8 digits, and either rounds logits once; the gradients went through more."""
    model = classifier(name, LABELS, problem_type=MULTI)
    expected, gradients = step(model, INPUTS, labels=TARGETS[MULTI])
    use_fused_loss(model, fused_head=True)
    got, found = step(model, INPUTS, labels=TARGETS[MULTI])
    torch.testing.assert_close(got.loss, expected.loss.float(), rtol=2**-8, atol=0)
    largest = max(grad.abs().max() for grad in gradients.values())
    for each, grad in gradients.items():
        torch.testing.assert_close(found[each], grad, rtol=0, atol=float(largest) * 2**-6)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_under_ddp(name, tmp_path):
    """Which raises in the second step if the first left a parameter without a gradient."""
    model = classifier(name, LABELS, problem_type=MULTI)
    use_fused_loss(model, fused_head=True)
    _, (got, found) = data_parallel_alone(
        model, tmp_path, lambda parallel: [step(parallel, INPUTS, labels=TARGETS[MULTI]) for _ in range(2)]
    )
    expected, gradients = step(model, INPUTS, labels=TARGETS[MULTI])
    assert torch.equal(got.loss, expected.loss)
    assert all(torch.equal(found[f"module.{each}"], grad) for each, grad in gradients.items())


@pytest.mark.parametrize(
    "labels", [MULTI_HOT.float(), padded(SparseLabels.from_dense(MULTI_HOT))], ids=["dense", "padded"]
)
def test_compiled_in_one_graph(labels):
    model = classifier("Llama", LABELS, problem_type=MULTI)
    expected, gradients = step(model, INPUTS, labels=TARGETS[MULTI])
    use_fused_loss(model, fused_head=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, found = step(compiled, INPUTS, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    check_gradients({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, gradients)
    with torch.no_grad():
        assert compiled(**INPUTS).logits.shape == (4, LABELS)


def test_the_head_takes_a_part_of_the_unpatched_ones_memory():
    """In processes of their own; the program fails where one of its claims does."""
    command = [sys.executable, "-m", "bench.classifiers", "--quick"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "BERTLOSS_FAST_BACKEND": "eager"}  # the interpreter takes minutes
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": holds") == 2
