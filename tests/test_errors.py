"""Bad input: each error names the argument, what was expected and what came, and nothing is launched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import row_errors
import torch

import bertloss_fast as bf
from bertloss_fast.ops import dispatch

N, L = 4, 5
FOCAL, BCE = bf.sigmoid_focal_loss, bf.binary_cross_entropy_with_logits
X, Y = torch.zeros(N, L), torch.zeros(N, L)
MASK = torch.ones(N, L, dtype=torch.bool)
LABELS = bf.SparseLabels.from_lists([[0], [], [1, 2], [4]], L)
LOSSES = (
    *(FOCAL, BCE, bf.asymmetric_loss, bf.poly_focal_loss, bf.distribution_balanced_loss, bf.ghm_loss),
    *row_errors.LOSSES,
    bf.mse_loss,
    bf.kl_div,
)


def integers(dtype: torch.dtype, value: int = 7) -> torch.Tensor:
    targets = torch.zeros(N, L, dtype=dtype)
    targets[2, 3] = value
    return targets


CASES: dict[str, row_errors.Case] = {
    "a silently broadcast target": (FOCAL, (X, Y[:, :1]), {}, ValueError, r"targets: .*\(4, 5\).*inputs.*\(4, 1\)"),
    "torch's name of it": (BCE, (X, Y[:, :1]), {}, ValueError, r"target: .*\(4, 5\) like input, got \(4, 1\)"),
    "integer logits": (FOCAL, (X.long(), Y), {}, TypeError, "inputs: expected float16.*float64, got int64"),
    "8-bit logits": (FOCAL, (X.to(torch.float8_e4m3fn), Y), {}, TypeError, "inputs: .*got float8_e4m3fn"),
    "no tensor": (FOCAL, ([[0.0]], Y), {}, TypeError, "inputs: expected a tensor, got list"),
    "sparse logits": (FOCAL, (X.to_sparse(), Y), {}, TypeError, "inputs: expected a dense tensor, got.*sparse_coo"),
    "complex targets": (FOCAL, (X, Y.cfloat()), {}, TypeError, "targets: .*got complex64"),
    "unknown reduction": (FOCAL, (X, Y), {"reduction": "avg"}, ValueError, "reduction: .*mean_positive, got 'avg'"),
    "no reduction": (FOCAL, (X, Y), {"reduction": None}, ValueError, "reduction: .*got None"),
    "negative gamma": (FOCAL, (X, Y), {"gamma": -1}, ValueError, "gamma: expected a number >= 0, got -1"),
    "missing gamma": (FOCAL, (X, Y), {"gamma": float("nan")}, ValueError, "gamma: .*got nan"),
    "gamma of a tensor": (FOCAL, (X, Y), {"gamma": torch.ones(())}, TypeError, "gamma: .*got Tensor"),
    "large alpha": (FOCAL, (X, Y), {"alpha": 1.5}, ValueError, "alpha: expected .* 1, got 1.5"),
    "large alpha of a label": (FOCAL, (X, Y), {"alpha": torch.full((L,), 1.5)}, ValueError, "alpha: .*0 to 1.*1.5"),
    "alpha of another length": (FOCAL, (X, Y), {"alpha": torch.ones(3)}, ValueError, r"alpha: .*\(5,\).*\(3,\)"),
    "targets elsewhere": (FOCAL, (X, Y.to("meta")), {}, ValueError, "targets: .*'cpu' like inputs, got 'meta'"),
    "weight elsewhere": (FOCAL, (X, Y), {"weight": Y.to("meta")}, ValueError, "weight: .*'cpu'.*'meta'"),
    "a count": (FOCAL, (X, integers(torch.int64)), {}, ValueError, r"targets: expected 0 or 1, got 7 at \(2, 3\)"),
    "a byte": (FOCAL, (X, integers(torch.uint8)), {}, ValueError, r"targets: .*got 7 at \(2, 3\)"),
    "a large unsigned": (FOCAL, (X, integers(torch.uint16, 40000)), {}, ValueError, "targets: .*got 40000"),
    "a padding index": (BCE, (X, integers(torch.int32, -100)), {}, ValueError, r"target: .*got -100 at \(2, 3\)"),
    "pos_weight of another length": (
        FOCAL,
        (X, Y),
        {"pos_weight": torch.ones(4)},
        ValueError,
        r"pos_weight: .*\(5,\).*\(4,\)",
    ),
    "pos_weight of a matrix": (BCE, (X, Y), {"pos_weight": X}, ValueError, r"pos_weight: .*\(5,\).*\(4, 5\)"),
    "weight of the rows": (FOCAL, (X, Y), {"weight": torch.ones(N, 1)}, ValueError, r"weight: .*\(5,\).*\(4, 1\)"),
    "weight that cannot broadcast": (BCE, (X, Y, torch.ones(3, 1)), {}, ValueError, r"weight: .*\(4, 5\).*\(3, 1\)"),
    "learned weight": (BCE, (X, Y, torch.ones(L, requires_grad=True)), {}, ValueError, "weight: .*requires_grad"),
    "complex weight": (
        BCE,
        (X, Y, torch.ones(L).cfloat()),
        {},
        TypeError,
        "weight: expected a real dtype.*got complex64",
    ),
    "unknown backend": (
        FOCAL,
        (X, Y),
        {"backend": "cuda"},
        ValueError,
        "backend: expected one of triton, eager, inductor.*'cuda'",
    ),
    # options
    "mask of another shape": (FOCAL, (X, Y), {"mask": MASK[:1]}, ValueError, r"mask: .*\(4, 5\).*\(1, 5\)"),
    "mask of numbers": (BCE, (X, Y), {"mask": Y}, TypeError, "mask: expected bool, got float32"),
    "sample_weight of the labels": (
        FOCAL,
        (X, Y),
        {"sample_weight": torch.ones(L)},
        ValueError,
        r"sample_weight: .*\(4,\), one value a row.*\(5,\)",
    ),
    "smoothing of 1": (FOCAL, (X, Y), {"label_smoothing": 1.0}, ValueError, "label_smoothing: .*less than 1, got 1"),
    "ignored positives": (FOCAL, (X, Y.long()), {"ignore_index": 1}, ValueError, "ignore_index: .*no label, got 1"),
    "ignored unsigned": (FOCAL, (X, Y.byte()), {"ignore_index": -1}, TypeError, "ignore_index: .*signed.*got uint8"),
    "ignored bool": (FOCAL, (X, Y.bool()), {"ignore_index": -1}, TypeError, "ignore_index: .*got bool"),
    "ignored sparse": (FOCAL, (X, LABELS), {"ignore_index": -1}, ValueError, "ignore_index: .*sparse labels.*got -1"),
    "a count beside ignored": (
        FOCAL,
        (X, integers(torch.int64)),
        {"ignore_index": -100},
        ValueError,
        r"targets: expected 0 or 1, got 7 at \(2, 3\)",
    ),
    "normalizer of nothing": (FOCAL, (X, Y), {"normalizer": 2}, ValueError, "normalizer: .*'none'"),
    "normalizer of 0": (BCE, (X, Y), {"normalizer": 0}, ValueError, "normalizer: expected a number > 0, got 0"),
    "normalizer of a vector": (BCE, (X, Y), {"normalizer": torch.ones(2)}, ValueError, r"normalizer: .*got \(2,\)"),
    "an unknown option": (FOCAL, (X, Y), {"smoothing": 0.1}, TypeError, "smoothing: .*the options are weight, "),
    "another loss's option": (bf.ghm_loss, (X, Y), {"alpha": 0.5}, TypeError, "alpha: expected no such argument"),
    "an option of ours": (bf.asymmetric_loss, (X, Y), {"as_torch": True}, TypeError, "as_torch: expected no such"),
    "ignored beyond int8": (FOCAL, (X, Y.char()), {"ignore_index": 256}, ValueError, "ignore_index: .*int8.*got 256"),
    "ignored beyond bf16": (FOCAL, (X, Y.bfloat16()), {"ignore_index": -1001}, ValueError, "bfloat16 holds, got -1001"),
    "a huge pos_weight": (FOCAL, (X, Y), {"pos_weight": 1e300}, ValueError, r"pos_weight: .*from 0 to 1e\+30, got 1e"),
    "a memory of another kind": (FOCAL, (X, Y), {"upstream_memory": 3}, TypeError, "upstream_memory: .*got int"),
    "learned labels": (bf.zlpr_loss, (X, Y.clone().requires_grad_()), {}, ValueError, "targets: .*requires_grad=True"),
    "counts in fp16": (
        bf.ghm_loss,
        (X, Y),
        {"running_counts": torch.zeros(30).half()},
        TypeError,
        "running_counts: .*float16",
    ),
    "counts of nothing": (bf.prior_bias, (None, 10), {}, TypeError, "counts: expected .*got NoneType"),
    # sparse labels
    "sparse labels of other rows": (FOCAL, (X, LABELS[1:]), {}, ValueError, r"targets: .*\(4, 5\).*got \(3, 5\)"),
    "sparse labels elsewhere": (FOCAL, (X, LABELS.to("meta")), {}, ValueError, "targets: .*'cpu'.*'meta'"),
    "sparse label out of range": (
        bf.SparseLabels.from_lists,
        ([[0], [1, 7]], L),
        {},
        ValueError,
        "label < 5, got 7 in row 1",
    ),
    "decreasing rows": (
        bf.SparseLabels.from_csr,
        (torch.tensor([0, 2, 1]), torch.tensor([0]), L),
        {},
        ValueError,
        "crow_indices: ",
    ),
    # the other losses
    "asl: clip": (bf.asymmetric_loss, (X, Y), {"clip": 1.0}, ValueError, "clip: .*less than 1, got 1"),
    "asl: gamma": (bf.asymmetric_loss, (X, Y), {"gamma_neg": -1}, ValueError, "gamma_neg: .*-1"),
    "poly: epsilon": (bf.poly_focal_loss, (X, Y), {"epsilon": float("inf")}, ValueError, "epsilon: .*inf"),
    "balanced: negative counts": (
        bf.distribution_balanced_loss,
        (X, Y, [1, 2, -3, 4, 5], 10),
        {},
        ValueError,
        "class_counts: expected counts >= 0, got -3",
    ),
    "balanced: too many": (
        bf.distribution_balanced_loss,
        (X, Y, [1, 2, 30, 4, 5], 10),
        {},
        ValueError,
        "class_counts: expected counts <= num_samples = 10, got 30",
    ),
    "balanced: labels": (
        bf.distribution_balanced_loss,
        (X, Y, [1, 2], 10),
        {},
        ValueError,
        r"class_counts: .*\(5,\).*\(2,\)",
    ),
    "balanced: learned targets": (
        bf.distribution_balanced_loss,
        (X, Y.clone().requires_grad_(), [1] * L, 10),
        {},
        ValueError,
        "targets: .*requires_grad",
    ),
    "ghm: momentum": (bf.ghm_loss, (X, Y), {"momentum": 1.0}, ValueError, "momentum: .*less than 1, got 1"),
    "ghm: negative momentum": (bf.ghm_loss, (X, Y), {"momentum": -0.1}, ValueError, "momentum: .*-0.1"),
    "ghm: bins": (bf.ghm_loss, (X, Y), {"bins": 0}, ValueError, "bins: .*1 to 1024, got 0"),
    "ghm: counts": (
        bf.ghm_loss,
        (X, Y),
        {"running_counts": torch.zeros(3)},
        ValueError,
        r"running_counts: .*\(30,\).*\(3,\)",
    ),
    "counts: negative": (bf.class_balanced_weight, ([1, -2],), {}, ValueError, "counts: .*>= 0, got -2"),
    "counts: beta": (bf.class_balanced_weight, ([1, 2], 1.0), {}, ValueError, "beta: .*less than 1, got 1"),
    "counts: samples": (bf.pos_weight_from_counts, ([1, 200], 100), {}, ValueError, "counts: .*100, got 200"),
    "counts: one sample": (bf.prior_bias, ([1], 1), {}, ValueError, "num_samples: .*>= 2, got 1"),
    "module: smoothing": (bf.BCEWithLogitsLoss, (), {"label_smoothing": -0.1}, ValueError, "label_smoothing: .*-0.1"),
    "module: ghm": (bf.GHMLoss, (), {"momentum": 2.0}, ValueError, "momentum: .*2.0"),
    "module: reduction": (bf.SigmoidFocalLoss, (), {"reduction": "avg"}, ValueError, "reduction: .*'avg'"),
    "module: backend": (bf.SigmoidFocalLoss, (), {"backend": "cuda"}, ValueError, "backend: expected one of.*'cuda'"),
    "module: gamma": (bf.SigmoidFocalLoss, (), {"gamma": -1}, ValueError, "gamma: .*-1"),
    "module: alpha": (bf.SigmoidFocalLoss, (1.5,), {}, ValueError, "alpha: .*1.5"),
    "module: torch's reduction": (bf.BCEWithLogitsLoss, (), {"reduction": "avg"}, ValueError, "reduction: .*'avg'"),
}
ALL_CASES = CASES | {f"rows: {name}": case for name, case in row_errors.CASES.items()}


@pytest.mark.parametrize("case", ALL_CASES)
def test_one_sentence_and_no_launch(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        pytest.fail("computed before the arguments were checked")

    monkeypatch.setattr("bertloss_fast.ops.sigmoid.sigmoid_launcher", never)
    monkeypatch.setattr("bertloss_fast.reference.sigmoid.elementwise", never)
    for name in ("softmax", "distillation"):
        monkeypatch.setattr(f"bertloss_fast.functional.{name}.softmax_loss", never)
    monkeypatch.setattr("bertloss_fast.functional.pointwise.pointwise_loss", never)
    function, args, options, error, sentence = ALL_CASES[case]
    if function in LOSSES:
        options = {"backend": backend, **options}
    with pytest.raises(error, match=sentence):
        function(*args, **options)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertloss_fast.ops.dispatch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend: 'triton' cannot run on device 'cpu': .*TRITON_INTERPRET=1"):
        FOCAL(X, Y, backend="triton")


@pytest.mark.parametrize(
    ("value", "sentence"), [("triton", "'triton' cannot run on device 'cpu'"), ("gpu", "expected one of")]
)
def test_a_backend_from_the_environment(value: str, sentence: str) -> None:
    program = "import torch, bertloss_fast as bf; bf.sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(2, 3))"
    environment = {**os.environ, "BERTLOSS_FAST_BACKEND": value, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert f"ValueError: BERTLOSS_FAST_BACKEND: {sentence}" in result.stderr


def test_a_chosen_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    from bertloss_fast.ops import sigmoid

    def forward(backend: str, *arguments: object) -> tuple[torch.Tensor]:
        runs.append(backend)
        return (X,)

    monkeypatch.setattr(sigmoid, "FAMILY", sigmoid.FAMILY._replace(forward=forward))
    monkeypatch.setattr("bertloss_fast.ops.dispatch.INTERPRETED", True)
    FOCAL(X, Y)
    bf.set_backend("eager")
    try:
        FOCAL(X, Y)
        FOCAL(X, Y, backend="triton")
    finally:
        bf.set_backend(None)
    with pytest.raises(ValueError, match="backend: expected one of"):
        bf.set_backend("fast")
    assert runs == ["triton", "eager", "triton"]


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("chosen", [None, "eager", "inductor", "triton"])
@pytest.mark.parametrize("backend", [None, "eager", "inductor", "triton", "fast"])
def test_small_batches_know_when_eager_is_chosen(
    backend: str | None, chosen: str | None, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_chosen", chosen)
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
    try:
        found = dispatch.resolve(backend, torch.device("cpu"))
    except ValueError:
        found = "an error"
    assert dispatch.is_eager_on_cpu(backend) == (found == "eager")


def test_values_on_a_gpu_are_looked_at_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert not dispatch.can_check_values(gpu)
    monkeypatch.setenv("BERTLOSS_FAST_DEBUG", "1")
    assert dispatch.can_check_values(gpu)
