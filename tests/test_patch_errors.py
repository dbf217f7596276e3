"""What use_fused_loss refuses, and that it leaves the model as it was then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

import transformers
from architectures import LABELS, MULTI, SINGLE, classifier, texts

import bertloss_fast as bf
from bertloss_fast.integrations.transformers import undo_fused_loss, use_fused_loss
from bertloss_fast.integrations.transformers.patch import patch_of


class LowRank(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, input):
        return self.base_layer(input) + self.up(self.down(input))


def adapted(model):
    model.classifier = LowRank(model.classifier)


def quantized(model):
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, LABELS + 1), nn.Linear(LABELS + 1, LABELS))
    model.classifier[-1].__class__ = type("Linear4bit", (nn.Linear,), {})


def followed_by(function):
    def change(model):
        layer, followed = model.classifier, nn.Module()
        followed.layer = layer
        followed.forward = lambda input: function(layer(input))
        model.classifier = followed

    return change


def twice(model):
    layer, calls = model.classifier, nn.Module()
    calls.layer = layer
    calls.forward = lambda input: layer(input) + layer(input)
    model.classifier = calls


def headless(model):
    model.classifier = nn.Identity()


# What is done to a model, and what is said then.
NO_HEAD = {
    "a layer in parts": (adapted, r"model: expected logits that are the output of classifier.up, .* got RuntimeError"),
    "a layer of another kind": (quantized, "model: expected an nn.Linear of 5 outputs, one a label, at its end"),
    "doubled logits": (followed_by(lambda z: 2 * z), "model: expected logits that are the output of classifier.layer"),
    "shifted logits": (followed_by(lambda z: z + 1), "model: expected logits that are the output of classifier.layer"),
    "cut logits": (
        followed_by(lambda z: z.clamp(-1e-3, 1e-3)),
        "model: expected logits that are the output of classifier.layer",
    ),
    "probabilities": (followed_by(torch.sigmoid), "model: expected logits that are the output of classifier.layer"),
    "logits in rows": (
        followed_by(lambda z: z.view(-1, LABELS)),
        "model: .* the output of classifier.layer, .* to come out in their place, got RuntimeError",
    ),
    "two calls": (twice, "model: expected one call of classifier.layer, its last linear layer, got 2"),
    "no layer": (
        headless,
        r"model: expected logits of shape \(N, 5\), got \(1, 16\)",
    ),
}


@pytest.mark.parametrize("case", NO_HEAD)
def test_heads_that_are_not_one_linear_layer(case):
    """Even where bias and weight are zero, at which many functions are the identity."""
    change, match = NO_HEAD[case]
    model = classifier("Bert", LABELS, problem_type=MULTI)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    change(model)
    model.bert.eval()  # some modules train, and some do not
    flags, kinds = ([get(module) for module in model.modules()] for get in (lambda m: m.training, type))
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        use_fused_loss(model, fused_head=True)
    assert [module.training for module in model.modules()] == flags
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert patch_of(model) is None


def test_too_little_memory_is_said_as_such():
    model = classifier("Bert", LABELS, problem_type=MULTI)

    def fail(*_):
        raise torch.OutOfMemoryError("of the device")

    model.dropout.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="of the device"):
        use_fused_loss(model, fused_head=True)


def test_as_many_labels_as_features():
    """Then every layer has as many outputs; the last one is found, and nothing else changes."""
    model = classifier("Bert", 16, problem_type=MULTI)
    model.bert.eval()
    flags, random = [module.training for module in model.modules()], torch.get_rng_state()
    undo = use_fused_loss(model, fused_head=True)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert patch_of(model).head == "classifier"
    labels = torch.eye(4, 16)
    got = model.eval()(**texts(4), labels=labels).loss
    undo()
    torch.testing.assert_close(got, model(**texts(4), labels=labels).loss)


def test_a_layer_that_is_replaced_later():
    model = classifier("Bert", LABELS, problem_type=MULTI)
    undo = use_fused_loss(model, fused_head=True)
    adapted(model)
    with pytest.raises(
        TypeError, match=r"classifier: expected the linear layer .* got LowRank; call use_fused_loss after"
    ):
        model(**texts(4), labels=torch.zeros(4, LABELS))
    undo()
    assert type(model.classifier.base_layer) is nn.Linear
    assert model(**texts(4), labels=torch.zeros(4, LABELS)).logits.shape == (4, LABELS)


def bert(**settings):
    return classifier("Bert", LABELS, **settings)


def on_meta():
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(bert().config)


def of_type(kind):
    model = bert()
    model.config.problem_type = kind
    return model


def once():
    model = bert()
    use_fused_loss(model)
    return model


def prepared():
    model = bert()
    model.forward = model.forward
    return model


REFUSED = {
    "not of transformers": (
        lambda: use_fused_loss(nn.Linear(2, 2)),
        (TypeError, "model: expected a model of transformers, not what wraps or compiles one; got Linear"),
    ),
    "wrapped": (lambda: use_fused_loss(torch.compile(bert())), (TypeError, "model: expected .* got OptimizedModule")),
    "an encoder": (
        lambda: use_fused_loss(bert().bert),
        (TypeError, "model: expected a sequence classifier, got BertModel, which takes no labels"),
    ),
    "twice": (
        lambda: use_fused_loss(once()),
        (ValueError, "model: expected one without .*; undo_fused_loss takes it off"),
    ),
    "twice, undone": (
        lambda: undo_fused_loss(bert()),
        (ValueError, "model: expected one that use_fused_loss has patched, got a BertForSequenceClassification"),
    ),
    "no switch": (
        lambda: use_fused_loss(bert(), fused_head="no"),
        (TypeError, "fused_head: expected True or False, got str"),
    ),
    "prepared": (
        lambda: use_fused_loss(prepared()),
        (ValueError, "model: expected its class's own forward, got another"),
    ),
    "meta": (
        lambda: use_fused_loss(on_meta(), fused_head=True),
        (ValueError, "model: expected parameters with values"),
    ),
    "lists": (
        lambda: use_fused_loss(bert(), bf.LambdaLoss()),
        (TypeError, "loss: expected one of bertloss_fast .*got LambdaLoss"),
    ),
    "torch's": (
        lambda: use_fused_loss(bert(), nn.BCEWithLogitsLoss()),
        (TypeError, "loss: expected .*got torch.nn.BCEWithLogitsLoss"),
    ),
    "not reduced": (
        lambda: use_fused_loss(bert(), bf.SigmoidFocalLoss(reduction="none")),
        (ValueError, "loss: expected a reduction to one number, got reduction='none'"),
    ),
    "of one class": (
        lambda: use_fused_loss(bert(problem_type=MULTI), bf.CrossEntropyLoss()),
        (ValueError, f"loss: expected one for '{MULTI}', model.config.problem_type; got CrossEntropyLoss"),
    ),
    "of several labels": (
        lambda: use_fused_loss(bert(problem_type=SINGLE), bf.ZlprLoss()),
        (ValueError, f"loss: expected one for '{SINGLE}', model.config.problem_type; got ZlprLoss"),
    ),
    "unknown type": (lambda: use_fused_loss(of_type("other")), (ValueError, "problem_type: expected one of .*'other'")),
    "rows in a head": (
        lambda: use_fused_loss(bert(), bf.ZlprLoss(), fused_head=True),
        (TypeError, "loss: expected one that a linear layer takes in .*, got ZlprLoss"),
    ),
    "one label in a head": (
        lambda: use_fused_loss(classifier("Bert", 1), fused_head=True),
        (TypeError, "loss: expected one that a linear layer takes in .*, got MSELoss"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_fit_nothing(case):
    call, (kind, match) = REFUSED[case]
    with pytest.raises(kind, match=match):
        call()


def test_calls_that_fit_nothing():
    model = bert()
    use_fused_loss(model)
    with pytest.raises(
        ValueError, match=r"problem_type: expected one, since integers of shape \(N, 1\) may be classes"
    ):
        model(**texts(4), labels=torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(TypeError, match="labels: expected a tensor or SparseLabels, got list"):
        model(**texts(4), labels=[[0], [1], [2], [3]])
    with pytest.raises(ValueError, match="labels: expected some beside num_items_in_batch"):
        model(**texts(4), num_items_in_batch=4)
    tokens = transformers.BertForTokenClassification(bert().config)
    use_fused_loss(tokens, bf.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"model: expected logits of shape \(N, 5\), got \(4, 6, 5\)"):
        tokens(**texts(4), labels=torch.zeros(4, 6, dtype=torch.long))
