"""use_fused_loss against the models' own losses."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

from architectures import (
    HIDDEN,
    INPUTS,
    LABELS,
    MULTI,
    MULTI_HOT,
    REGRESSION,
    SETTINGS,
    SINGLE,
    TARGETS,
    check_gradients,
    classifier,
    step,
)

import bertloss_fast
from bertloss_fast import SparseLabels
from bertloss_fast.integrations.transformers import use_fused_loss

pytestmark = pytest.mark.usefixtures("one_thread", "eager")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("problem", TARGETS)
def test_losses_gradients_and_logits_are_the_models_own(name, problem):
    model, labels = classifier(name, LABELS, problem_type=problem), TARGETS[problem]
    expected, gradients = step(model, INPUTS, labels=labels)
    model.eval()
    with torch.no_grad():
        evaluated = model(**INPUTS, labels=labels)
    for fused_head in (False, True)[: 1 if problem == REGRESSION else 2]:
        with use_fused_loss(model.train(), fused_head=fused_head):
            got, found = step(model, INPUTS, labels=labels)
            torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
            check_gradients(found, gradients)
            assert (got.logits is None) == fused_head
            model.eval()
            with torch.no_grad():
                output = model(**INPUTS, labels=labels)
            torch.testing.assert_close(output.loss, evaluated.loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(output.logits, evaluated.logits, rtol=1e-5, atol=1e-6)
    again, after = step(model.train(), INPUTS, labels=labels)
    assert torch.equal(again.loss, expected.loss)
    assert all(torch.equal(after[each], gradients[each]) for each in gradients)


@pytest.mark.parametrize("fused_head", [False, True])
@pytest.mark.parametrize("name", ["Bert", "DistilBert", "GPT2", "T5"])
def test_outputs_keep_their_form(name, fused_head):
    model = classifier(name, LABELS, problem_type=MULTI, use_cache=False).eval()
    options = {"output_hidden_states": True, "return_dict": False}
    expected = model(**INPUTS, labels=TARGETS[MULTI], **options)
    without = model(**INPUTS, **options)
    names = list(inspect.signature(model.forward).parameters)
    signature = inspect.signature(model.forward)
    use_fused_loss(model, fused_head=fused_head)
    assert inspect.signature(model.forward) == signature
    place = names.index("labels")
    in_place = [INPUTS.get(each) for each in names[:place]]
    for got in (model(**INPUTS, labels=TARGETS[MULTI], **options), model(*in_place, TARGETS[MULTI], **options)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**INPUTS, **options), without, rtol=0, atol=0)
    assert list(model(**INPUTS, labels=TARGETS[MULTI]).keys())[:2] == ["loss", "logits"]
    loss, logits, *rest = model.train()(**INPUTS, labels=TARGETS[MULTI], **options)
    assert loss.shape == ()
    assert (logits is None) == fused_head
    assert len(rest) == len(expected) - 2


PADDED = torch.tensor([[3, 0, -100], [-100, -100, -100], [3, 1, 2], [4, 0, -100]])
FORMS = {
    "bool": MULTI_HOT.bool(),
    "uint8": MULTI_HOT.byte(),
    "int64": MULTI_HOT,
    "float64": MULTI_HOT.double(),
    "padded": PADDED,
    "sparse": SparseLabels.from_padded(PADDED, LABELS),
}


@pytest.mark.parametrize("fused_head", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels_and_their_inferred_type(form, fused_head):
    model = classifier("Roberta", LABELS)
    expected = F.binary_cross_entropy_with_logits(model.eval()(**INPUTS).logits, MULTI_HOT.float())
    use_fused_loss(model, fused_head=fused_head)
    assert model.config.problem_type is None
    loss = model(**INPUTS, labels=FORMS[form]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=form != "float64")
    assert model.config.problem_type == MULTI


def test_what_is_ignored_and_other_types_that_labels_tell():
    model, labels = classifier("Roberta", LABELS).eval(), MULTI_HOT.clone()
    labels[:, 2], labels[3] = -100, -100
    logits = model(**INPUTS).logits
    kept = labels != -100
    with use_fused_loss(model, bertloss_fast.BCEWithLogitsLoss()):
        expected = F.binary_cross_entropy_with_logits(logits[kept], labels[kept].float())
        for form in (labels, labels.float()):
            torch.testing.assert_close(model(**INPUTS, labels=form).loss, expected, rtol=1e-6, atol=0)
    model.config.problem_type = None
    with use_fused_loss(model):
        model(**INPUTS, labels=TARGETS[SINGLE].int())
        assert model.config.problem_type == SINGLE
    one = classifier("Roberta", 1).eval()
    expected = one(**INPUTS, labels=torch.ones(4)).loss
    one.config.problem_type = None
    use_fused_loss(one)
    torch.testing.assert_close(one(**INPUTS, labels=torch.ones(4)).loss, expected, rtol=1e-6, atol=0)
    assert one.config.problem_type == REGRESSION


def test_the_kernels_of_the_default_backend():
    bertloss_fast.set_backend(None)
    model = classifier("Llama", LABELS, problem_type=MULTI)
    expected, gradients = step(model, INPUTS, labels=TARGETS[MULTI])
    use_fused_loss(model, fused_head=True)
    got, found = step(model, INPUTS, labels=TARGETS[MULTI])
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    check_gradients(found, gradients)


@pytest.mark.parametrize(("reduction", "number"), [("sum", 1), ("mean", 80), ("batchmean", 16)])
def test_a_number_of_items_divides(reduction, number):
    """Trainer's, of the elements in 16 rows."""
    model = classifier("Roberta", LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    use_fused_loss(model, bertloss_fast.SigmoidFocalLoss(reduction=reduction), fused_head=True)
    total = bertloss_fast.sigmoid_focal_loss(model(**INPUTS).logits, MULTI_HOT.float(), reduction="sum")
    for training in (True, False):  # through the layer, and of logits
        got = model.train(training)(**INPUTS, labels=MULTI_HOT.bool(), num_items_in_batch=torch.tensor(80)).loss
        torch.testing.assert_close(got, total / number, rtol=1e-5, atol=0)


class Widest(torch.overrides.TorchFunctionMode):
    """The number of elements of the largest result."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_every_token_are_never_made(training):
    many, model = 3000, classifier("Llama", 3000, problem_type=MULTI).train(training)
    labels = torch.zeros(4, 2, dtype=torch.long)
    labels[:, 1] = -100
    with Widest() as own:
        model(**INPUTS, labels=torch.zeros(4, many))
    use_fused_loss(model, fused_head=True)
    with Widest() as ours:
        model(**INPUTS, labels=labels)
    assert own.elements == 4 * 6 * many
    assert ours.elements <= HIDDEN * many  # the weight's gradient, or the logits of the texts


def test_other_threads_see_the_whole_model():
    """One stands between head and encoder while another calls the same model."""
    model = classifier("Bert", LABELS, problem_type=MULTI).eval()
    expected = model(**INPUTS).logits
    use_fused_loss(model, fused_head=True)
    inside, go_on = threading.Event(), threading.Event()
    results = {}

    def wait(*_):
        if threading.current_thread().name == "first":
            inside.set()
            assert go_on.wait(60)

    def first():
        results["loss"] = model(**INPUTS, labels=TARGETS[MULTI]).loss

    model.dropout.register_forward_hook(wait)
    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert inside.wait(60)
    meanwhile = model(**INPUTS).logits
    with_labels = model(**INPUTS, labels=TARGETS[MULTI]).loss
    go_on.set()
    thread.join()
    assert torch.equal(meanwhile, expected)
    assert torch.equal(results["loss"], with_labels)


def test_after_an_exception_the_layer_is_whole():
    model = classifier("Bert", LABELS, problem_type=MULTI).eval()
    use_fused_loss(model, fused_head=True)
    expected = model(**INPUTS).logits
    handle = model.dropout.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**INPUTS, labels=TARGETS[MULTI])
    handle.remove()
    assert torch.equal(model.classifier(model.bert(**INPUTS).pooler_output), expected)
    with pytest.raises(ValueError, match="shape"):
        model(**INPUTS, labels=TARGETS[MULTI][:2])
    assert torch.equal(model(**INPUTS).logits, expected)
