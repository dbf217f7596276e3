"""The losses as modules, and inside what torch transforms."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from public import call
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bertloss_fast as bf

L = 6
MODULES: dict[str, Callable[[], nn.Module]] = {
    "focal": lambda: bf.SigmoidFocalLoss(None, 1.5, "mean"),
    "focal-by-label": lambda: bf.SigmoidFocalLoss(
        torch.linspace(0, 1, L), reduction="batchmean", weight=torch.arange(1.0, L + 1), pos_weight=torch.tensor(2.0)
    ),
    "bce": lambda: bf.BCEWithLogitsLoss(),
    "asl": lambda: bf.AsymmetricLossMultiLabel(2.0, clip=0.1, pos_weight=3.0, label_smoothing=0.1),
    "poly": lambda: bf.PolyBinaryCrossEntropy(1.0, 2.0, torch.linspace(0, 1, L)),
    "balanced": lambda: bf.DistributionBalancedLoss([500, 20, 3, 1, 0, 7], 1000),
    "ghm": lambda: bf.GHMLoss(10).eval(),
    "zlpr": lambda: bf.ZlprLoss("sum"),
    "two-way": lambda: bf.TwoWayLoss(3.0, 0.5),
    "ce": lambda: bf.CrossEntropyLoss(label_smoothing=0.1),
    "ce-weighted": lambda: bf.CrossEntropyLoss(torch.arange(1.0, L + 1), z_loss=0.1, logit_softcap=5.0),
    "softmax-focal": lambda: bf.SoftmaxFocalLoss(1.5, torch.linspace(1, 2, L), label_smoothing=0.2),
    "poly-ce": lambda: bf.PolyCrossEntropy(1.0, weight=torch.arange(1.0, L + 1)),
    "ldam": lambda: bf.LDAMLoss([500, 20, 3, 1, 0, 7], scale=3.0),
    "distillation": lambda: bf.DistillationLoss(3.0, 0.7),
    "r-drop": lambda: bf.RDropLoss(2.0),
    "js": lambda: bf.JSDivLoss(),
    "margin-mse": lambda: bf.MarginMSELoss(),
    "mse": lambda: bf.MSELoss(),
    "kl": lambda: bf.KLDivLoss(reduction="batchmean"),
    "lambda": lambda: bf.LambdaLoss("NDCGLoss1", k=3, sigma=0.5, reduction="batchmean"),
    "rank-net": lambda: bf.RankNetLoss(k=2, reduction_log="natural"),
    "list-net": lambda: bf.ListNetLoss(),
    "list-mle": lambda: bf.ListMLELoss("sum"),
    "p-list-mle": lambda: bf.PListMLELoss(torch.linspace(3, 1, L)),
    "adr-mse": lambda: bf.ADRMSELoss(2.0),
    "negatives": lambda: bf.MultipleNegativesRankingLoss(2.0, None),
    "bce-weighted": lambda: bf.BCEWithLogitsLoss(torch.arange(1.0, L + 1), reduction="sum", pos_weight=torch.ones(L)),
}


def batch(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, L, generator=generator)).to(device, dtype).requires_grad_()
    return x, (torch.rand(4, L, generator=generator) < 0.4).to(device)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("name", MODULES)
def test_copies_give_the_same_loss(
    name: str, through: Callable[[nn.Module], nn.Module], device: torch.device, backend: str
) -> None:
    module = MODULES[name]().to(device)
    module.backend = backend
    x, y = batch(device)
    torch.testing.assert_close(call(through(module), x, y), call(module, x, y), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    ["focal-by-label", "bce-weighted", "asl", "poly", "balanced", "ce-weighted", "softmax-focal", "poly-ce", "ldam"],
)
def test_state_dict_restores_the_weights(name: str, device: torch.device) -> None:
    module, other = MODULES[name]().to(device), MODULES[name]().to(device)
    for buffer in other.buffers():
        buffer.zero_()
    x, y = batch(device)
    assert call(other, x, y) != call(module, x, y)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(call(other, x, y), call(module, x, y), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "two-way"])
def test_a_call_s_own_options(name: str, device: torch.device, backend: str) -> None:
    """A row that is masked, one that weighs nothing, and one that is not there, change a sum alike."""
    module = MODULES[name]().to(device)
    module.reduction, module.backend = "sum", backend
    x, y = batch(device)
    rows = [0, 2, 3]
    mask = torch.ones_like(y)
    mask[1] = False
    expected = call(module, x[rows], y[rows])
    taken = 0
    of_z = name == "ce-weighted"  # which no weight touches
    for options in ({"mask": mask}, {"sample_weight": mask[:, 0].float()}):
        if of_z or (name in ("balanced", "ghm") and "sample_weight" in options):  # whose weights follow what counts
            continue
        try:
            found = call(module, x, y, **options)
        except TypeError:
            continue
        taken += 1
        torch.testing.assert_close(found, expected)
    assert taken or of_z
    torch.testing.assert_close(call(module, x, y, normalizer=2.0), call(module, x, y) / 2)


def test_a_call_without_options_takes_all_of_the_module_s(device: torch.device, backend: str) -> None:
    """Binary cross-entropy hands them on by name then."""
    weights = {"weight": torch.rand(L), "pos_weight": torch.rand(L) + 1}
    module = bf.BCEWithLogitsLoss(**weights, ignore_index=-1, label_smoothing=0.2, backend=backend).to(device)
    x, y = batch(device)
    y = y.long()
    y[0] = -1
    alone, beside = module(x, y), module(x, y, mask=torch.ones_like(y, dtype=torch.bool))
    torch.testing.assert_close(alone, beside)


def test_state_dict_is_that_of_torch(device: torch.device) -> None:
    theirs = nn.BCEWithLogitsLoss(weight=torch.rand(L), pos_weight=torch.rand(L)).to(device)
    ours = bf.BCEWithLogitsLoss(weight=torch.ones(L), pos_weight=torch.ones(L)).to(device)
    ours.load_state_dict(theirs.state_dict())
    x, y = batch(device)
    torch.testing.assert_close(ours(x, y.float()), theirs(x, y.float()))


@pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (None, False), (True, False)])
def test_deprecated_arguments_as_in_torch(size_average: bool | None, reduce: bool | None, device: torch.device) -> None:
    x, y = batch(device)
    arguments = {"size_average": size_average, "reduce": reduce}
    with pytest.warns(UserWarning, match="deprecated"):
        ours = bf.BCEWithLogitsLoss(**arguments)(x, y)
    with pytest.warns(UserWarning, match="deprecated"):
        theirs = nn.BCEWithLogitsLoss(**arguments)(x, y.float())
    torch.testing.assert_close(ours, theirs)


REFUSED = ("weight", "pos_weight", "label_smoothing", "ignore_index", "backend", "smoothing")


def takes(name: str, option: str) -> bool:
    """torch's mse_loss has its weight from the call; which labels are ignored depends on what holds them."""
    several = {"sigmoid", "imbalance", "rowwise"}
    family = type(MODULES[name]()).__module__.rpartition(".")[2]
    return (name, option) == ("mse", "weight") or (option == "ignore_index" and family in several)


@pytest.mark.parametrize(("name", "option"), [(n, o) for n in MODULES for o in REFUSED if not takes(n, o)])
def test_what_a_call_does_not_take(name: str, option: str) -> None:
    """Nothing is taken and then ignored."""
    x = torch.zeros(5, L)
    with pytest.raises(TypeError, match=option):
        call(MODULES[name](), x, x.bool(), **{option: 1})


@pytest.mark.parametrize("name", [name for name in MODULES if takes(name, "ignore_index")])
def test_what_a_call_ignores(name: str, device: torch.device, backend: str) -> None:
    """As a mask has it: what the call says, or what the module does where that is None."""
    module = MODULES[name]().to(device)
    module.backend, module.ignore_index = backend, -7
    x, y = batch(device)
    mask = torch.ones_like(y)
    mask[1, 2:] = mask[3] = False
    expected = call(MODULES[name]().to(device), x, y, mask=mask)
    for ignored, given in ((-100, -100), (-7, None)):
        found = call(module, x, torch.where(mask, y.int(), ignored), ignore_index=given)
        torch.testing.assert_close(found, expected)


def test_counts_stay_fp32(device: torch.device) -> None:
    """65536 elements of a bin are infinite in fp16, and would weigh nothing from then on."""
    module = bf.GHMLoss().to(device)
    x, y = torch.zeros(300, 300, device=device), torch.zeros(300, 300, dtype=torch.bool, device=device)
    expected = [module(x, y).item() for _ in range(3)]
    module = bf.GHMLoss().half().to(device)
    assert module.running_counts.dtype == torch.float32
    torch.testing.assert_close([module(x.half(), y).item() for _ in range(3)], expected, rtol=1e-4, atol=0)


def test_to_moves_and_casts_the_weights(device: torch.device) -> None:
    module = MODULES["focal-by-label"]().to(device, torch.float64)
    assert {(buffer.device.type, buffer.dtype) for buffer in module.buffers()} == {(device.type, torch.float64)}
    assert "gamma=2.0" in repr(module)
    assert "alpha=tensor(6,)" in repr(module)


def test_autocast_gives_torch_s_dtype(device: torch.device, backend: str) -> None:
    x, y = batch(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        theirs = nn.BCEWithLogitsLoss()(x, y.bfloat16())
        ours = bf.BCEWithLogitsLoss(backend=backend)(x, y)
        assert bf.sigmoid_focal_loss(x, y, backend=backend).dtype == torch.float32
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_gradient_accumulation_and_a_scaled_loss(device: torch.device, backend: str) -> None:
    """What GradScaler and transformers' Trainer do: scale the loss in place, and add gradients up."""
    x, y = batch(device)
    module = bf.SigmoidFocalLoss(reduction="mean", backend=backend)
    (expected,) = torch.autograd.grad(module(x, y), x)
    for _ in range(4):
        loss = module(x, y)
        loss *= 0.25
        loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_compiled_with_a_gamma_that_changes(device: torch.device) -> None:
    x, y = batch(device)
    module = bf.SigmoidFocalLoss(reduction="mean")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for gamma in (2.0, 1.5, 1.2):
        module.gamma = gamma
        torch.testing.assert_close(compiled(x, y), module(x, y))


def test_traces_and_modes_see_plain_operations(device: torch.device) -> None:
    """Nothing that was learnt by looking at one call's values may be kept for another's, or looked for in fake ones."""
    x, y = batch(device)
    hard, soft = y.float(), torch.rand(y.shape, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and still in use
        traced = torch.jit.trace(lambda x, y: bf.sigmoid_focal_loss(x, y, reduction="mean"), (x, hard))
    torch.testing.assert_close(traced(x, soft), bf.sigmoid_focal_loss(x, soft, reduction="mean"))
    with FakeTensorMode() as mode:
        fake = bf.sigmoid_focal_loss(mode.from_tensor(x), mode.from_tensor(hard))
        assert fake.shape == x.shape
    assert bf.binary_cross_entropy_with_logits(x, y).device == x.device
