"""What the interpreter cannot show: sizes, streams, captured graphs, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

import bertloss_fast as bf

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def batch(rows: int, labels: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, labels, device=CUDA, dtype=dtype).requires_grad_()
    return x, torch.randint(2, (rows, labels), device=CUDA, dtype=torch.uint8)


@pytest.mark.parametrize("numel", [2**31 - 3, 2**31 + 5], ids=["the last 32-bit sizes", "past 32 bits"])
def test_more_elements_than_32_bits_count(numel: int) -> None:
    x, y = batch(1, numel)
    (grad,) = torch.autograd.grad(bf.sigmoid_focal_loss(x, y, reduction="sum"), x)
    for part in (slice(0, 5000), slice(numel - 5000, numel)):
        leaf = x[:, part].detach().requires_grad_()
        (expected,) = torch.autograd.grad(bf.sigmoid_focal_loss(leaf, y[:, part], reduction="sum"), leaf)
        assert torch.equal(grad[:, part], expected)


def test_a_captured_graph_replays_with_new_inputs() -> None:
    x, y = batch(64, 1000)
    bf.sigmoid_focal_loss(x, y, reduction="mean").backward()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = bf.sigmoid_focal_loss(x, y, reduction="mean")
        loss.backward()
    fresh, labels = batch(64, 1000)
    with torch.no_grad():
        x.copy_(fresh)
        y.copy_(labels)
    graph.replay()
    expected = bf.sigmoid_focal_loss(fresh, labels, reduction="mean")
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad, fresh.grad)


def test_on_a_side_stream() -> None:
    x, y = batch(512, 10000)
    expected = bf.sigmoid_focal_loss(x, y, reduction="mean")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss = bf.sigmoid_focal_loss(x, y, reduction="mean")
    stream.synchronize()
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("classes", [2, 20, 1000, 30522, 50257])
def test_the_label_s_gradient_is_stored_last(classes: int) -> None:
    """Another thread stores a 0 in its place first."""
    x = torch.randn(2**24 // classes, classes, device=CUDA).requires_grad_()
    y = torch.randint(classes, (len(x),), device=CUDA)
    (expected,) = torch.autograd.grad(bf.cross_entropy(x, y, reduction="sum", backend="eager"), x)
    for _ in range(5):
        (grad,) = torch.autograd.grad(bf.cross_entropy(x, y, reduction="sum"), x)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


LINEAR = {"linear focal": bf.linear_sigmoid_focal_loss, "linear cross-entropy": bf.linear_cross_entropy}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_layer_waits_for_nothing_and_is_right(name: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(64, 128, device=CUDA, dtype=dtype).requires_grad_()
    weight = (torch.randn(5000, 128, device=CUDA) / 16).to(dtype).requires_grad_()
    if name == "linear focal":
        y: torch.Tensor | bf.SparseLabels = bf.SparseLabels.from_lists([[3, 4999]] * 64, 5000).to(CUDA)
        options = {"reduction": "mean"}
    else:
        y, options = torch.randint(5000, (64,), device=CUDA), {"chunk_size": 16}
    memory = bf.UpstreamMemory()

    def run(*leaves: torch.Tensor, **more: object) -> torch.Tensor:
        return LINEAR[name](leaves[0], leaves[1], y, **options, **more)

    def step() -> tuple[torch.Tensor, ...]:
        loss = run(hidden, weight, upstream_memory=memory)
        return loss, *torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, 0.5))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    true = run(*exact)
    for value, expected in zip(found, (true, *torch.autograd.grad(0.5 * true, exact)), strict=True):
        error = (value - expected).abs().max() / expected.abs().max()
        assert error < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_step_on_a_gpu(dtype: torch.dtype) -> None:
    head = bf.MultiLabelHead(64, 3000, device=CUDA, dtype=dtype)
    hidden, y = torch.randn(32, 64, device=CUDA, dtype=dtype), torch.rand(32, 3000, device=CUDA) < 0.01
    before = head.weight.detach().clone()
    (gradient,) = torch.autograd.grad(head(hidden, y), head.weight)
    head.fused_step(hidden, y, bf.HeadSGD(1.0, momentum=0.5))
    moved = (before.float() - head.weight.float()).detach()
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * before.abs().max().item()
    torch.testing.assert_close(moved, gradient.float(), rtol=1e-2, atol=tolerance)


WAITING = [
    (loss, reduction)
    for loss in ("focal", "balanced", "ghm", "zlpr")
    for reduction in ("none", "mean", "mean_positive")
]


@pytest.mark.parametrize(("loss", "reduction"), [*WAITING, ("two-way", "mean")])
def test_nothing_waits_for_the_device(loss: str, reduction: str) -> None:
    x, y = batch(32, 100)
    function, options = {
        "focal": (bf.sigmoid_focal_loss, {}),
        "balanced": (
            bf.distribution_balanced_loss,
            {"class_counts": torch.arange(1, 101, device=CUDA), "num_samples": 1000},
        ),
        "ghm": (bf.ghm_loss, {"running_counts": torch.zeros(30, device=CUDA)}),
        "zlpr": (bf.zlpr_loss, {}),
        "two-way": (bf.two_way_loss, {}),
    }[loss]
    function(x, y, reduction=reduction, **options).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = function(x, y, reduction=reduction, **options)
        value.backward(torch.full_like(value, 0.5))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_module_expects_what_came_last() -> None:
    """On the stream of its warm-up, as CUDA graphs ask for one; replays see new inputs."""
    module = bf.SigmoidFocalLoss(reduction="mean")
    x, y = batch(64, 1000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        (0.25 * module(x, y)).backward()
        x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = module(x, y)
            (0.25 * loss).backward()
    torch.cuda.synchronize()
    fresh, labels = batch(64, 1000)
    with torch.no_grad():
        x.copy_(fresh)
        y.copy_(labels)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    expected = bf.sigmoid_focal_loss(fresh, labels, reduction="mean")
    (grad,) = torch.autograd.grad(0.25 * expected, fresh)
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad, grad)
