"""A patched model in Trainer, against the model's own loss on all rows of an optimizer step at once."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

from architectures import LABELS, MULTI, SINGLE, classifier, texts
from transformers import Trainer

from bertloss_fast import SparseLabels
from bertloss_fast.integrations.transformers import FusedLossTrainer, use_fused_loss
from bertloss_fast.integrations.transformers.collator import padded
from tests.bert import arguments, trained

ROWS = 16
DRAW = torch.Generator().manual_seed(3)
MULTI_HOT = (torch.rand(ROWS, LABELS, generator=DRAW) < 0.4).float()
CLASSES = torch.randint(LABELS, (ROWS,), generator=DRAW)
CLASSES[[0, 1, 5, 6, 7, 12]] = -100  # not as many in every four rows
PADDED = padded(SparseLabels.from_dense(MULTI_HOT))
LABELS_OF = {MULTI: MULTI_HOT, SINGLE: CLASSES}
NO_DROPOUT = {
    "Bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "DistilBert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},  # takes no other arguments
    "Llama": {},
}
pytestmark = pytest.mark.usefixtures("one_thread", "eager")


def make_trainer(model, folder, labels, size, kind=Trainer, *, more=None, **options):
    """Of two optimizer steps, each of all rows."""
    columns = {**texts(ROWS), "labels": labels, "unused": torch.arange(ROWS)}
    rows = [{name: column[row] for name, column in columns.items()} for row in range(ROWS)]
    options = {"max_steps": 2, "learning_rate": 0.5, "gradient_accumulation_steps": ROWS // size, **options}
    return kind(model, arguments(folder, size, **options), train_dataset=rows, eval_dataset=rows, **more or {})


@pytest.mark.parametrize(
    ("name", "problem"), [("Bert", MULTI), ("Bert", SINGLE), ("DistilBert", MULTI), ("Llama", SINGLE)]
)
def test_four_times_four_is_sixteen_at_once(name, problem, tmp_path):
    def model():
        return classifier(name, LABELS, problem_type=problem, **NO_DROPOUT[name])

    expected = trained(make_trainer(model(), tmp_path, LABELS_OF[problem], 16))
    for fused_head in (False, True):
        patched = model()
        use_fused_loss(patched, fused_head=fused_head)
        found = trained(make_trainer(patched, tmp_path, LABELS_OF[problem], 4))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if problem == MULTI:  # and where Trainer's own count is not what divides
        patched = model()
        patched.config.problem_type = None
        use_fused_loss(patched, fused_head=True)
        found = trained(make_trainer(patched, tmp_path, PADDED, 4, FusedLossTrainer))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_model_that_accelerate_has_wrapped(tmp_path):
    """Mixed precision puts a method over the model's, and what takes it off again stops at the patch."""
    model = classifier("Bert", LABELS, problem_type=MULTI, **NO_DROPOUT["Bert"])
    use_fused_loss(model, fused_head=True)
    trainer = make_trainer(model, tmp_path, MULTI_HOT, 4, bf16=True)
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(**texts(ROWS), num_items_in_batch=1)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False).eval()
    got = unwrapped(**texts(ROWS), labels=MULTI_HOT).loss.item()
    assert got == pytest.approx(expected, rel=2**-7)  # of bfloat16
    unwrapped.train()
    assert unwrapped(**texts(ROWS), labels=MULTI_HOT).logits is None


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"more": {"compute_loss_func": torch.add}}])
@pytest.mark.parametrize("name", ["Bert", "DistilBert"])
def test_labels_that_trainer_keeps_to_itself(name, settings, tmp_path):
    model = classifier(name, LABELS, problem_type=SINGLE)
    use_fused_loss(model)
    trainer = make_trainer(model, tmp_path, CLASSES, 4, **settings)
    for work in (trainer.train, trainer.evaluate):
        with pytest.raises(
            ValueError,
            match=r"labels: expected some beside num_items_in_batch, got None; .* label_smoothing_factor keep labels",
        ):
            work()
