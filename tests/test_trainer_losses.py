"""What compute_loss_func makes of every public loss: batches of an optimizer step against all of their rows at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

from public import MODULES, SHAPE, needed

import bertloss_fast as bf
from bertloss_fast.integrations.transformers import ItemCounts, TrainerLoss, compute_loss_func
from bertloss_fast.integrations.transformers.collator import padded

L = SHAPE[1]
ROWS = 10
BATCHES = [slice(0, 5), slice(5, 9), slice(9, 10)]  # the last one of an epoch is short
FAMILIES = {name: loss.__module__.rpartition(".")[2] for name, loss in MODULES.items()}
OF_SEVERAL = [name for name, family in FAMILIES.items() if family in ("sigmoid", "imbalance", "rowwise")]
OF_CLASSES = [name for name, family in FAMILIES.items() if family == "softmax"]
OF_THE_BATCH = {"GHMLoss", "TwoWayLoss"}  # whose value is no sum over rows
Batches = Callable[[slice], Any]


def make_loss(name: str, reduction: str, **options: Any) -> nn.Module:
    module: nn.Module = MODULES[name](**needed(MODULES[name]) | {"reduction": reduction} | options)
    module.backend = "eager"
    return module


def logits(rows: int = ROWS, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, L, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def multi_hot() -> tuple[Tensor, Tensor]:
    """Labels, one row of them without any; and which count: a whole row does not, and some of others."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(ROWS, L, generator=generator) < 0.4
    kept = torch.rand(ROWS, L, generator=generator) < 0.8
    labels[2] = False
    kept[7] = False
    return labels, kept


def class_labels() -> Tensor:
    classes = torch.arange(ROWS) * 5 % L
    classes[[1, 8]] = -100
    return classes


def forms() -> dict[str, tuple[Batches, Tensor | None]]:
    """Labels in each form that holds several, as batches; and which of them count, where one can say so."""
    labels, kept = multi_hot()
    sparse = bf.SparseLabels.from_dense(labels)
    ignoring = {dtype: torch.where(kept, labels.to(dtype), -100) for dtype in (torch.int8, torch.int64, torch.float32)}
    return {
        "bool": (lambda rows: labels[rows], None),
        "uint8": (lambda rows: labels.byte()[rows], None),
        **{str(dtype).removeprefix("torch."): (dense.__getitem__, kept) for dtype, dense in ignoring.items()},
        "padded": (lambda rows: padded(sparse[rows]), None),
        "sparse": (lambda rows: sparse[rows], None),
    }


FORMS = ["bool", "uint8", "int8", "int64", "float32", "padded", "sparse"]
REDUCTIONS = ["sum", "mean", "batchmean", "mean_positive"]
# What Trainer's own count, of the labels that are not -100, is enough for.
TRAINER_COUNTS = {
    "mean": {"bool", "uint8", "int8", "int64", "float32"},
    "batchmean": {"bool", "uint8"},
    "mean_positive": {"padded"},
    "sum": set(FORMS) - {"sparse"},
}


def accumulated(loss: TrainerLoss, x: Tensor, labels: Batches, count: Any) -> tuple[Tensor, Tensor]:
    """The sum of the batches' losses, and its gradient."""
    total = torch.stack([loss({"logits": x[rows]}, labels(rows), count) for rows in BATCHES]).sum()
    return total.detach(), torch.autograd.grad(total, x)[0]


def counted(loss: TrainerLoss, labels: Batches) -> ItemCounts:
    """As FusedLossTrainer does it."""
    return ItemCounts(sum(loss.counts(labels(rows), L).denominator for rows in BATCHES), L)


def counted_by_trainer(labels: Batches) -> Tensor:
    return torch.stack([labels(rows).ne(-100).sum() for rows in BATCHES]).sum()


def at_once(module: nn.Module, x: Tensor, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    loss = module(x, *given, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


CASES = [(name, reduction) for name in OF_SEVERAL for reduction in REDUCTIONS if name not in OF_THE_BATCH]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_batches_add_up(name: str, reduction: str, form: str) -> None:
    """Ignored elements are those of a mask, and the other forms say what bool says."""
    x, (labels, kept) = logits(), forms()[form]
    loss = compute_loss_func(make_loss(name, reduction))
    expected = at_once(make_loss(name, reduction), x, multi_hot()[0], mask=kept)
    torch.testing.assert_close(accumulated(loss, x, labels, counted(loss, labels)), expected)
    if form == "sparse":
        return
    if form in TRAINER_COUNTS["batchmean" if (name, reduction) == ("ZlprLoss", "mean") else reduction]:
        torch.testing.assert_close(accumulated(loss, x, labels, counted_by_trainer(labels)), expected)
    else:
        with pytest.raises(ValueError, match=r"num_items_in_batch: expected a count of .*FusedLossTrainer"):
            accumulated(loss, x, labels, counted_by_trainer(labels))


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_batches_of_classes_add_up(name: str, reduction: str) -> None:
    x, classes = logits(), class_labels()
    loss = compute_loss_func(make_loss(name, reduction))
    expected = at_once(make_loss(name, reduction), x, classes)
    torch.testing.assert_close(accumulated(loss, x, classes.__getitem__, counted(loss, classes.__getitem__)), expected)
    by_trainer = counted_by_trainer(classes.__getitem__)
    if reduction == "batchmean":
        with pytest.raises(
            ValueError, match=r"expected a count of rows for .*, got Trainer's, of rows that are not ignored"
        ):
            accumulated(loss, x, classes.__getitem__, by_trainer)
    else:
        torch.testing.assert_close(accumulated(loss, x, classes.__getitem__, by_trainer), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "PolyCrossEntropy"])
def test_batches_of_class_probabilities_add_up(name: str, reduction: str) -> None:
    x, given = logits(), logits(seed=3).detach().softmax(-1)
    loss = compute_loss_func(make_loss(name, reduction, weight=torch.arange(1.0, L + 1)))
    expected = at_once(loss.loss, x, given)
    for count in (counted(loss, given.__getitem__), counted_by_trainer(given.__getitem__)):
        torch.testing.assert_close(accumulated(loss, x, given.__getitem__, count), expected)


def test_class_weights_divide_a_cross_entropy_as_in_torch() -> None:
    x, classes, weight = logits(), class_labels(), torch.linspace(0.01, 0.1, L)  # whose sum is less than 1
    loss = compute_loss_func(bf.CrossEntropyLoss(weight, label_smoothing=0.1))
    expected = at_once(nn.CrossEntropyLoss(weight, label_smoothing=0.1), x, classes)
    torch.testing.assert_close(accumulated(loss, x, classes.__getitem__, counted(loss, classes.__getitem__)), expected)
    with pytest.raises(ValueError, match="expected a count of class weights"):
        accumulated(loss, x, classes.__getitem__, counted_by_trainer(classes.__getitem__))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("columns", [1, L])
def test_regression_adds_up(columns: int, reduction: str) -> None:
    """As transformers' models have it: the logits of one number lose a dimension."""
    x = logits()[:, :columns]
    numbers = logits(seed=4).detach()[:, :columns].squeeze(1)
    numbers[3] = -100  # is a number
    loss = compute_loss_func(bf.MSELoss(reduction=reduction))
    expected = at_once(nn.MSELoss(reduction=reduction), x, numbers.view_as(x))
    count = ItemCounts(loss.counts(numbers, columns).denominator, columns)
    torch.testing.assert_close(accumulated(loss, x, numbers.__getitem__, count), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "ZlprLoss"])
def test_soft_labels(name: str, dtype: torch.dtype) -> None:
    """Their sum divides mean_positive, in float32; ZLPR counts those above one half."""
    x, soft = logits(), logits(seed=5).detach().sigmoid().to(dtype)
    loss = compute_loss_func(make_loss(name, "mean_positive"))
    expected = at_once(loss.loss, x, soft)
    torch.testing.assert_close(accumulated(loss, x, soft.__getitem__, counted(loss, soft.__getitem__)), expected)


def test_classes_of_tokens() -> None:
    loss, tokens = compute_loss_func(bf.CrossEntropyLoss()), class_labels().view(2, 5)
    found = loss.of_logits(logits().view(2, 5, L), tokens, loss.counts(tokens, L))
    torch.testing.assert_close(found, nn.CrossEntropyLoss()(logits(), class_labels()))


@pytest.mark.parametrize("name", sorted(OF_THE_BATCH))
def test_what_is_no_sum_over_rows_is_weighted_by_rows(name: str) -> None:
    x, (labels, _) = logits(), multi_hot()
    loss = compute_loss_func(make_loss(name, "mean"))
    other = make_loss(name, "mean")
    expected = sum(other(x[rows], labels[rows]) * len(labels[rows]) / ROWS for rows in BATCHES)
    found = accumulated(loss, x, labels.__getitem__, counted(loss, labels.__getitem__))
    torch.testing.assert_close(found, (expected.detach(), torch.autograd.grad(expected, x)[0]))
    assert not torch.isclose(found[0], at_once(make_loss(name, "mean"), x, labels)[0], rtol=1e-3)


def test_an_evaluation_leaves_running_counts_alone() -> None:
    loss = compute_loss_func(make_loss("GHMLoss", "mean"))
    with torch.no_grad():
        loss({"logits": logits()}, multi_hot()[0])
    assert not loss.loss.running_counts.any()
    loss({"logits": logits()}, multi_hot()[0], torch.tensor(ROWS * L))
    assert loss.loss.running_counts.sum() > 0


LAYER = {
    "BCEWithLogitsLoss": {"pos_weight": torch.linspace(1, 2, L)},
    "SigmoidFocalLoss": {"alpha": None},
    "AsymmetricLossMultiLabel": {},
    "PolyBinaryCrossEntropy": {},
    "CrossEntropyLoss": {"z_loss": 0.1, "logit_softcap": 5.0, "label_smoothing": 0.1},
    "SoftmaxFocalLoss": {"alpha": torch.linspace(1, 2, L)},
}


LAYER_CASES = [
    (name, form) for name in LAYER for form in (FORMS if name in OF_SEVERAL else ["classes", "probabilities"])
]
LAYER_CASES.remove(("SoftmaxFocalLoss", "probabilities"))  # it takes none


@pytest.mark.parametrize(("name", "form"), LAYER_CASES)
def test_a_linear_layer_and_its_loss(name: str, form: str) -> None:
    """As the loss of its logits."""
    given = {"classes": class_labels().__getitem__, "probabilities": logits(seed=3).detach().softmax(-1).__getitem__}
    labels = given.get(form) or forms()[form][0]
    loss = compute_loss_func(make_loss(name, "mean", **LAYER[name]))
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((ROWS, 4), (L, 4), (L,)))
    layer = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    of_window = counted(loss, labels)
    for count in (of_window, None):
        expected = loss.of_logits(hidden @ weight.T + bias, labels(slice(None)), count)
        found = loss.of_layer(hidden, weight, bias, labels(slice(None)), count, chunk_size=4)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, layer), torch.autograd.grad(expected, layer))


def test_nothing_counts() -> None:
    """A window without a class, or whose elements are all ignored, has the loss 0 and the gradient 0."""
    x, classes, elements = logits(), torch.full((ROWS,), -100), torch.full((ROWS, L), -100)
    for module, labels in ((bf.CrossEntropyLoss(), classes), (make_loss("ZlprLoss", "mean"), elements)):
        loss = compute_loss_func(module)
        zero = torch.tensor(0.0), torch.zeros(ROWS, L)
        torch.testing.assert_close(accumulated(loss, x, labels.__getitem__, counted(loss, labels.__getitem__)), zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BCEWithLogitsLoss", "ZlprLoss", "CrossEntropyLoss", "MSELoss"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The loss of rounded logits, under autocast too."""
    x = logits()
    labels: Any = class_labels() if name == "CrossEntropyLoss" else multi_hot()[0]
    labels = logits(seed=4).detach() if name == "MSELoss" else labels
    loss = compute_loss_func(make_loss(name, "mean"))
    rounded = x.detach().to(dtype).requires_grad_()
    value, gradient = at_once(make_loss(name, "mean"), rounded.detach().float().requires_grad_(), labels)
    with torch.autocast("cpu", dtype):
        found = loss({"logits": rounded}, labels, loss.counts(labels, L))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, value, rtol=1e-4, atol=0)
    found.backward()
    torch.testing.assert_close(rounded.grad, gradient.to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_take_every_form(form: str, device: torch.device) -> None:
    labels, kept = forms()[form]
    options: dict[str, Any] = {"alpha": torch.linspace(0, 1, L)}
    loss = compute_loss_func(make_loss("SigmoidFocalLoss", "mean", **options))
    loss.loss.backend = "triton"
    x, given = logits().detach().to(device).requires_grad_(), labels(slice(None)).to(device)
    found = loss({"logits": x}, given, loss.counts(given, L))
    expected = at_once(make_loss("SigmoidFocalLoss", "mean", **options), logits(), multi_hot()[0], mask=kept)
    torch.testing.assert_close((found.detach().cpu(), torch.autograd.grad(found, x)[0].cpu()), expected)


@pytest.mark.parametrize("form", [*FORMS[:-1], "classes"])
def test_counting_waits_for_no_gpu(form: str) -> None:
    """A tensor without values has none to look at."""
    labels = class_labels() if form == "classes" else forms()[form][0](slice(None))
    for reduction in REDUCTIONS[: 3 if form == "classes" else 4]:
        for name in ("CrossEntropyLoss",) if form == "classes" else ("SigmoidFocalLoss", "ZlprLoss"):
            counted = compute_loss_func(make_loss(name, reduction)).counts(labels.to("meta"), L)
            assert counted.denominator.is_meta


def test_half_precision_weights_are_summed_in_float32() -> None:
    loss = compute_loss_func(bf.CrossEntropyLoss(torch.full((L,), 60_000.0, dtype=torch.float16)))
    assert loss.counts(torch.tensor([0, 1, -100]), L).denominator.item() == 120_000


def test_copies_give_the_same_loss() -> None:
    loss = compute_loss_func(make_loss("DistributionBalancedLoss", "mean"))
    x, labels = logits(), multi_hot()[0]
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.of_logits(x, labels) == loss.of_logits(x, labels)
    assert not isinstance(loss, nn.Module), "a model would save it"
