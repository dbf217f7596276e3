"""What ranking losses are called with: padded lists, and arguments that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import bertloss_fast as bf


def test_pad_lists(device: torch.device) -> None:
    flat = torch.randn(6, device=device, requires_grad=True)
    padded, lengths = bf.pad_lists(flat, [3, 0, 2, 1])
    assert lengths.tolist() == [3, 0, 2, 1]
    x = flat.tolist()
    assert padded.tolist() == [[*x[:3]], [0, 0, 0], [*x[3:5], 0], [x[5], 0, 0]]
    (padded * torch.arange(12, device=device).view(4, 3)).sum().backward()
    assert flat.grad.tolist() == [0, 1, 2, 6, 7, 9]
    mixed, _ = bf.pad_lists([torch.tensor([1, 0], device=device), torch.tensor([0.75], device=device)])
    assert mixed.tolist() == [[1, 0], [0.75, 0]]
    assert bf.pad_lists(torch.empty(0, dtype=torch.int64, device=device), [])[0].dtype == torch.int64
    of_lists = bf.pad_lists(list(flat.split([3, 0, 2, 1])), padding=-1.0)
    assert torch.equal(of_lists[1], lengths)
    assert of_lists[0][1].tolist() == [-1, -1, -1]


S, Y = torch.zeros(2, 3), torch.zeros(2, 3)
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no list": (lambda: bf.lambda_loss(torch.tensor(1.0), torch.tensor(1.0)), r"scores: expected shape \(\.\.\., n\)"),
    "too long": (
        lambda: bf.list_net_loss(torch.zeros(1, 4097), torch.zeros(1, 4097)),
        "at most 4096 documents, got 4097",
    ),
    "another shape": (lambda: bf.rank_net_loss(S, Y[:1]), r"labels: expected shape \(2, 3\) like scores, got \(1, 3\)"),
    "integer scores": (lambda: bf.rank_net_loss(S.int(), Y), "scores: expected float16, bfloat16, float32 or float64"),
    "labels with a gradient": (
        lambda: bf.list_net_loss(S, Y.clone().requires_grad_()),
        "labels: expected a tensor without gradient",
    ),
    "infinite labels": (lambda: bf.adr_mse_loss(S, Y - math.inf), "labels: expected finite numbers"),
    "NaN labels": (lambda: bf.adr_mse_loss(S, Y * math.nan), "labels: expected finite numbers"),
    "labels without a gain": (lambda: bf.lambda_loss(S, Y + 200), "labels: expected at most 100, .* got 200"),
    "lengths too long": (
        lambda: bf.lambda_loss(S, Y, lengths=torch.tensor([1, 4])),
        "lengths: expected numbers from 0 to 3, the documents of scores; got 4",
    ),
    "negative lengths": (lambda: bf.lambda_loss(S, Y, lengths=torch.tensor([-1, 2])), "lengths: .* got -1"),
    "floating lengths": (lambda: bf.lambda_loss(S, Y, lengths=torch.ones(2)), "lengths: expected an integer dtype"),
    "one length": (lambda: bf.lambda_loss(S, Y, lengths=torch.tensor([2])), r"lengths: expected shape \(2,\)"),
    "both": (lambda: bf.lambda_loss(S, Y, S > 0, torch.tensor([2, 2])), "lengths: expected None beside a mask"),
    "a mask of numbers": (lambda: bf.lambda_loss(S, Y, Y), "mask: expected bool, got float32"),
    "no such weighting": (
        lambda: bf.lambda_loss(S, Y, weighting="ndcg"),
        "weighting: expected one of NDCGLoss1, .*'ndcg'",
    ),
    "k of 0": (lambda: bf.lambda_loss(S, Y, k=0), "k: expected at least 1, or None"),
    "k of a half": (lambda: bf.rank_net_loss(S, Y, k=0.5), "k: expected an integer or None, got float"),
    "sigma of 0": (lambda: bf.lambda_loss(S, Y, sigma=0.0), "sigma: expected a number > 0"),
    "mu below 0": (lambda: bf.lambda_loss(S, Y, mu=-1), "mu: expected a number >= 0"),
    "another logarithm": (
        lambda: bf.lambda_loss(S, Y, reduction_log="ten"),
        "reduction_log: expected natural or binary",
    ),
    "no such reduction": (lambda: bf.lambda_loss(S, Y, reduction="max"), "reduction: expected one of none, sum"),
    "no such activation": (
        lambda: bf.multiple_negatives_ranking_loss(S, activation="relu"),
        "activation: expected one of sigmoid or None, got 'relu'",
    ),
    "weights below 0": (
        lambda: bf.p_list_mle_loss(S, lambda_weight=torch.tensor([1.0, -1, 0])),
        "lambda_weight: expected numbers from 0 to .*, got -1",
    ),
    "too few weights": (lambda: bf.p_list_mle_loss(S, lambda_weight=torch.ones(2)), r"lambda_weight: .* got \(2,\)"),
    "lists without lengths": (lambda: bf.pad_lists(torch.zeros(3)), "lengths: expected the number of documents"),
    "other lengths": (lambda: bf.pad_lists(torch.zeros(3), [1, 1]), "lengths: expected numbers that sum to 3"),
    "no labels": (lambda: bf.lambda_loss(S, None), "labels: expected a tensor, got NoneType"),
    "lengths of halves": (lambda: bf.pad_lists(torch.zeros(3), [1.5, 1.5]), "lengths: expected integers"),
    "padding by halves": (lambda: bf.pad_lists(torch.arange(3), [2, 1], 0.5), "padding: expected an integer"),
    "infinite weights": (
        lambda: bf.p_list_mle_loss(S, lambda_weight=torch.tensor([math.inf, 1, 0])),
        "lambda_weight: expected numbers from 0 to .*, got inf",
    ),
    "a module's weights below 0": (lambda: bf.PListMLELoss(-torch.ones(3)), "lambda_weight: expected numbers from 0"),
    "lists of lists": (lambda: bf.pad_lists([torch.zeros(1, 2)]), r"values\[0\]: expected shape \(n,\)"),
    "no lists": (lambda: bf.pad_lists([]), "values: expected at least one list"),
    "an option of the module": (lambda: bf.LambdaLoss()(S, Y, k=3), "k: expected one of mask, lengths, normalizer"),
    "a module's k": (lambda: bf.RankNetLoss(k=-1), "k: expected at least 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
