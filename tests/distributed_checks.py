"""What test_distributed.py has each of several processes do: DEVICE WORLD RANK FOLDER CHECK...

Every process knows the rows of all, and compares what the head of all processes gives it with a head of its own.
"""

from __future__ import annotations

import copy
import datetime
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import bertloss_fast as bf
from bertloss_fast.distributed import ShardedHead, shard_head

ROWS = {1: [5], 2: [2, 3], 4: [3, 0, 2, 4]}
FEATURES = 6
TIMEOUT = 3.0  # seconds, of the process group in which one hangs
GROUP_TIMEOUT = 60.0  # and of every other one


class Here(NamedTuple):
    """One of the processes."""

    device: str
    world: int
    rank: int
    folder: Path
    mesh: DeviceMesh

    @property
    def rows(self) -> slice:
        start = sum(ROWS[self.world][: self.rank])
        return slice(start, start + ROWS[self.world][self.rank])

    def labels(self, num_labels: int) -> slice:
        """Those of which this process has the weights."""
        step = -(-num_labels // self.world)
        return slice(min(self.rank * step, num_labels), min((self.rank + 1) * step, num_labels))


class Case(NamedTuple):
    """A loss, and the arguments of a call."""

    loss: nn.Module
    targets: Any
    options: dict[str, Any] = {}  # noqa: RUF012

    def of(self, rows: slice) -> Case:
        """Of some rows alone."""
        loss = copy.deepcopy(self.loss)
        if loss.weight is not None and loss.weight.dim() == 2:
            loss.weight = loss.weight[rows]
        options = {name: value[rows] if isinstance(value, Tensor) else value for name, value in self.options.items()}
        return Case(loss, self.targets[rows], options)


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases(device: str, num_labels: int, backend: str = "eager") -> dict[str, Case]:
    """Each reduction with each form of targets, and each kind of denominator; options of labels, of rows, of both."""
    rows = sum(ROWS[int(os.environ["WORLD_SIZE"])])
    dense = (random(rows, num_labels, seed=1) < 0.4).to(device)
    sparse = bf.SparseLabels.from_dense(dense)
    soft = random(rows, num_labels, seed=2).to(device)
    soft[1:] = dense[1:]  # one process has hard labels only
    ignored = torch.where(random(rows, num_labels, seed=3) < 0.3, -1, dense.cpu().int()).to(device)
    mask = (random(rows, num_labels, seed=4) < 0.6).to(device)
    mask[:, num_labels // 2 :] = False  # some processes have nothing that counts
    vector, more = random(num_labels, seed=5).to(device), 1 + random(num_labels, seed=6).to(device)
    of_row = random(rows, seed=7).to(device)
    chosen: dict[str, Any] = {"backend": "triton" if device == "cuda" else backend}
    return {
        "batchmean": Case(bf.SigmoidFocalLoss(alpha=vector, reduction="batchmean", **chosen), dense),
        "sum": Case(bf.AsymmetricLossMultiLabel(reduction="sum", **chosen), sparse, {"sample_weight": of_row}),
        "mean": Case(bf.BCEWithLogitsLoss(weight=vector, pos_weight=more, **chosen), soft),
        "mean of a mask": Case(bf.PolyBinaryCrossEntropy(**chosen), sparse, {"mask": mask}),
        "mean, some ignored": Case(bf.BCEWithLogitsLoss(ignore_index=-1, **chosen), ignored, {"mask": mask}),
        "mean of nothing": Case(bf.BCEWithLogitsLoss(**chosen), dense, {"mask": torch.zeros_like(mask)}),
        "mean_positive": Case(bf.SigmoidFocalLoss(reduction="mean_positive", **chosen), sparse),
        "mean_positive of a mask": Case(
            bf.BCEWithLogitsLoss(reduction="mean_positive", **chosen), sparse, {"mask": mask}
        ),
        "mean_positive, dense": Case(bf.BCEWithLogitsLoss(reduction="mean_positive", **chosen), soft, {"mask": mask}),
        "normalizer": Case(bf.SigmoidFocalLoss(reduction="sum", **chosen), dense, {"normalizer": 7.0}),
        "matrix": Case(bf.BCEWithLogitsLoss(weight=random(rows, num_labels, seed=8).to(device), **chosen), dense),
    }


def make(device: str, loss: nn.Module | None, num_labels: int, dtype: torch.dtype = torch.float64) -> bf.MultiLabelHead:
    torch.manual_seed(0)
    loss = bf.SigmoidFocalLoss(reduction="batchmean", backend="eager") if loss is None else loss
    return bf.MultiLabelHead(FEATURES, num_labels, loss, chunk_size=2, dtype=dtype).to(device)


def features(here: Here, *more: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = sum(ROWS[here.world])
    return (4 * random(rows, *more, FEATURES, seed=9) - 2).to(here.device, dtype)


def near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got.detach(), expected.detach(), rtol=2e-6 if got.dtype == torch.float32 else 1e-11, atol=1e-7
    )


def local(tensor: Any) -> Tensor:
    """A process's labels of what is split."""
    assert isinstance(tensor, DTensor)
    assert tensor.placements == (Shard(0),)
    return tensor.to_local()


def same_as_one(
    here: Here,
    num_labels: int,
    *,
    same_rows: bool = False,
    dtype: torch.dtype = torch.float64,
    backend: str = "eager",
) -> None:
    rows, labels = slice(None) if same_rows else here.rows, here.labels(num_labels)
    for name, case in cases(here.device, num_labels, backend).items():
        one = make(here.device, case.loss, num_labels, dtype)
        own = case.of(rows)
        split = shard_head(make(here.device, own.loss, num_labels, dtype), here.mesh, same_rows=same_rows)
        assert len(local(split.weight)) == labels.stop - labels.start
        hidden = features(here, dtype=dtype).requires_grad_()
        ours = features(here, dtype=dtype)[rows].requires_grad_()
        expected, got = one(hidden, case.targets, **case.options), split(ours, own.targets, **own.options)
        (expected / 4).backward()
        (got / 4).backward()
        try:
            near(got, expected)
            near(ours.grad, hidden.grad[rows])
            near(local(split.weight.grad), one.weight.grad[labels])
            near(local(split.bias.grad), one.bias.grad[labels])
            steps(here, one, split, hidden.detach(), ours.detach(), case, own)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def steps(here: Here, one: Any, split: Any, hidden: Tensor, ours: Tensor, case: Case, own: Case) -> None:
    """Two fused ones, of which the second depends on the first's momenta."""
    optimizers = [bf.HeadSGD(lr=0.1, momentum=0.9, weight_decay=0.01) for _ in range(2)]
    labels, rows = here.labels(one.num_labels), slice(None) if split.same_rows else here.rows
    for _ in range(2):
        expected = one.fused_step(hidden, case.targets, optimizers[0], loss_scale=2.0, **case.options)
        got = split.fused_step(ours, own.targets, optimizers[1], loss_scale=2.0, **own.options)
        near(got[0], expected[0])
        near(got[1], expected[1][rows])
        near(local(split.weight), one.weight[labels])
        near(local(split.bias), one.bias[labels])


def ten_labels(here: Here) -> None:
    same_as_one(here, 10)  # two processes have as many each, four do not


def a_process_without_labels(here: Here) -> None:
    same_as_one(here, 3)


def same_rows(here: Here) -> None:
    same_as_one(here, 10, same_rows=True)


def float32(here: Here) -> None:
    same_as_one(here, 10, dtype=torch.float32)


def kernels(here: Here) -> None:
    same_as_one(here, 3, backend="triton")


def rows_of_rows(here: Here) -> None:
    one, split = make(here.device, None, 10), shard_head(make(here.device, None, 10), here.mesh)
    hidden, targets = (
        features(here, 2).requires_grad_(),
        random(sum(ROWS[here.world]), 2, 10, seed=1).to(here.device) < 0.4,
    )
    ours = features(here, 2)[here.rows].requires_grad_()
    expected, got = one(hidden, targets), split(ours, targets[here.rows])
    expected.backward()
    got.backward()
    near(got, expected)
    near(ours.grad, hidden.grad[here.rows])
    assert torch.equal(split.topk(ours, 3).labels, one.topk(hidden, 3).labels[here.rows])


def no_rows_at_all(here: Here) -> None:
    split = shard_head(make(here.device, None, 10), here.mesh)
    hidden = features(here)[:0].requires_grad_()
    loss = split(hidden, torch.zeros(0, 10, dtype=torch.bool, device=here.device))
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, FEATURES)
    assert not local(split.weight.grad).any()
    assert split.topk(hidden, 2).labels.shape == (0, 2)
    assert split.predict(hidden).labels.shape == (0, 10)


def topk_and_predict(here: Here) -> None:
    for num_labels in (10, 3):
        for same_rows in (False, True):
            rows = slice(None) if same_rows else here.rows
            one = make(here.device, None, num_labels)
            split = shard_head(one, here.mesh, same_rows=same_rows)
            hidden = features(here)
            for k in (1, 3, num_labels):
                expected, got = one.topk(hidden, k), split.topk(hidden[rows], k)
                assert torch.equal(got.labels, expected.labels[rows])
                near(got.scores, expected.scores[rows])
            for threshold in (0.5, 0.0, 1.0, random(num_labels, seed=3).to(here.device)):
                expected, got = one.predict(hidden[rows], threshold), split.predict(hidden[rows], threshold)
                assert torch.equal(got.labels.to_dense(), expected.labels.to_dense())
                near(got.scores, expected.scores)


def begins_with_the_first_ones_weights(here: Here) -> None:
    one, other = make(here.device, None, 10), make(here.device, None, 10).requires_grad_(False)
    with torch.no_grad():
        other.weight += here.rank
    split = shard_head(other.eval(), here.mesh)
    near(local(split.weight), one.weight[here.labels(10)])
    assert not split.training
    assert not split.weight.requires_grad
    assert list(split.state_dict()) == ["weight", "bias"]
    found = [head.topk(features(here)[here.rows], 3) for head in (split, copy.deepcopy(split))]
    assert torch.equal(found[0].labels, found[1].labels)


def rounding_differs(here: Here) -> None:
    """The same bits on all shards would be no noise, over the labels of all."""
    head = make(here.device, None, 4 * here.world, torch.bfloat16)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(1.0)
    split = shard_head(head, here.mesh)
    hidden = torch.ones(len(features(here)[here.rows]), FEATURES, dtype=torch.bfloat16, device=here.device)
    targets = torch.zeros(len(hidden), 4 * here.world, dtype=torch.bool, device=here.device)
    split.fused_step(hidden, targets, bf.HeadSGD(lr=0.003))
    shards = split.weight.full_tensor().view(here.world, 4, FEATURES)
    assert len({str(shard.tolist()) for shard in shards}) == here.world


def beside_data_parallel(here: Here) -> None:
    """An encoder whose gradients are averaged, a head's that are whole, and an optimizer of both."""
    case = cases(here.device, 10)["mean of a mask"]
    own = case.of(here.rows)
    for fused in (False, True):
        torch.manual_seed(1)
        encoder = nn.Linear(FEATURES, FEATURES, dtype=torch.float64, device=here.device)
        one, split = make(here.device, case.loss, 10), shard_head(make(here.device, own.loss, 10), here.mesh)
        spread = DistributedDataParallel(copy.deepcopy(encoder))
        both = [[*encoder.parameters(), *one.parameters()], [*spread.parameters(), *split.parameters()]]
        optimizers = [torch.optim.AdamW(parameters, lr=0.1, foreach=False) for parameters in both]
        of_heads = [bf.HeadSGD(lr=0.1), bf.HeadSGD(lr=0.1)]
        for _ in range(2):
            expected, got = encoder(features(here)), spread(features(here)[here.rows])
            if fused:
                expected.backward(one.fused_step(expected, case.targets, of_heads[0], **case.options)[1])
                got.backward(split.fused_step(got, own.targets, of_heads[1], here.world, **own.options)[1])
            else:
                one(expected, case.targets, **case.options).backward()
                got.register_hook(lambda gradient: gradient * here.world)
                split(got, own.targets, **own.options).backward()
                norms = [torch.nn.utils.clip_grad_norm_(head.parameters(), 0.01) for head in (one, split)]
                near(norms[1].full_tensor(), norms[0])
            for parameter, like in zip(spread.parameters(), encoder.parameters(), strict=True):
                near(parameter.grad, like.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for parameter, like in zip(spread.parameters(), encoder.parameters(), strict=True):
            near(parameter, like)
        near(local(split.weight), one.weight[here.labels(10)])


def several_dimensions(here: Here) -> None:
    """Each half of the processes holds a head."""
    mesh = init_device_mesh(here.device, (2, 2), mesh_dim_names=("data", "labels"))
    one = make(here.device, None, 10)
    hidden, targets = features(here), random(sum(ROWS[4]), 10, seed=1) < 0.4
    rows = torch.split(torch.arange(len(hidden)), ROWS[4])
    group = here.rank // 2 * 2
    mine = torch.cat([rows[group], rows[group + 1]])
    for dim in ("labels", 1):
        split = shard_head(make(here.device, None, 10), mesh, dim)
        assert split.weight.placements == (Replicate(), Shard(0))
        assert len(split.weight.to_local()) == 5
        near(split(hidden[here.rows], targets[here.rows]), one(hidden[mine], targets[mine]))
        with pytest.raises(ValueError, match=r"^mesh: expected one dimension, since a fused step has no gradient"):
            split.fused_step(hidden[here.rows], targets[here.rows], bf.HeadSGD(0.1))
    for dim, text in ((None, "got None"), ("rows", "'rows'"), (2, "got 2"), (-1, "got -1")):
        with pytest.raises(
            ValueError, match=f"^dim: expected one of the mesh's 2 dimensions, 'data', 'labels'.*{text}"
        ):
            shard_head(one, mesh, dim)
    with pytest.raises(TypeError, match=r"^dim: expected"):
        shard_head(one, mesh, 1.0)


def errors(here: Here) -> None:
    head, mesh = make(here.device, None, 10), here.mesh
    split = shard_head(head, mesh)
    hidden, targets = features(here)[here.rows], torch.zeros(ROWS[here.world][here.rank], 10, dtype=torch.bool)
    dropping = bf.MultiLabelHead(FEATURES, 10, dropout=0.1)
    wrong = [
        (TypeError, "mesh: expected a DeviceMesh, got str", lambda: shard_head(head, "cpu")),
        (
            ValueError,
            "dim: expected one of the mesh's 1 dimensions, got 'labels'",
            lambda: shard_head(head, mesh, "labels"),
        ),
        (TypeError, "head: expected a MultiLabelHead, got Linear", lambda: shard_head(nn.Linear(2, 3), mesh)),
        (ValueError, "head: expected one that is not split yet", lambda: shard_head(split, mesh)),
        (ValueError, "reduction: .* 'none'", lambda: shard_head(make("cpu", bf.SigmoidFocalLoss(), 10), mesh)),
        (ValueError, "same_rows: .* dropout", lambda: shard_head(dropping, mesh, same_rows=True)),
        (TypeError, "targets: expected labels, got None", lambda: split(hidden)),
        (ValueError, "hidden: expected shape .*, got", lambda: split(hidden[:, :5], targets)),
        (ValueError, "hidden: expected shape .*, got", lambda: split.topk(hidden[:, :5], 2)),
        (ValueError, "target: expected shape", lambda: split(hidden, targets[:, :4])),
        (ValueError, "targets: .* without gradient", lambda: split(hidden, targets.double().requires_grad_())),
        (ValueError, "mask: expected shape", lambda: split(hidden, targets, mask=targets[:, :4])),
        (ValueError, "k: expected an integer from 1 to 10", lambda: split.topk(hidden, 11)),
        (ValueError, "threshold: expected", lambda: split.predict(hidden, torch.zeros(4))),
        (TypeError, "optimizer: expected a HeadSGD", lambda: split.fused_step(hidden, targets, None)),
        (
            TypeError,
            "linear_weight: expected a plain tensor, got a DTensor",
            lambda: of_dtensor(split, hidden, targets),
        ),
    ]
    for kind, text, call in wrong:
        with pytest.raises(kind, match=f"^{text}"):
            call()
    if here.world > 1:
        mixed = targets if here.rank else targets.int()
        with pytest.raises(ValueError, match=r"^hidden: expected one call on all processes, got on rank .*targets"):
            split(hidden, mixed)
        with pytest.raises(ValueError, match=r"^hidden: expected one call on all processes, got on rank .*topk"):
            split.topk(hidden, 2 + here.rank)
        sparse = bf.SparseLabels.from_dense(targets) if here.rank else None
        with pytest.raises(ValueError, match=r"^hidden: expected one call on all processes"):
            split.topk(hidden, 2) if sparse is None else split(hidden, sparse)


def of_dtensor(split: ShardedHead, hidden: Tensor, targets: Tensor) -> Tensor:
    return bf.linear_sigmoid_focal_loss(hidden, split.weight, targets)


def saves(here: Here) -> None:
    for num_labels in (10, 3):
        dcp.save(
            shard_head(make(here.device, None, num_labels), here.mesh).state_dict(),
            checkpoint_id=here.folder / str(num_labels),
        )


def loads(here: Here) -> None:
    """What other processes saved: into as many shards as there are, into one head, and from the meta device."""
    for num_labels in (10, 3):
        saved = make(here.device, None, num_labels).state_dict()
        other = make(here.device, None, num_labels)
        with torch.no_grad():
            other.weight.zero_()
        with torch.device("meta"):
            meta = bf.MultiLabelHead(FEATURES, num_labels, dtype=torch.float64)
        for head in (other, shard_head(other, here.mesh), shard_head(meta, here.mesh).to_empty(device=here.device)):
            state = head.state_dict()
            dcp.load(state, checkpoint_id=here.folder / str(num_labels))
            head.load_state_dict(state)
            for name, expected in saved.items():
                got = head.state_dict()[name]
                near(got.full_tensor() if isinstance(got, DTensor) else got, expected)


def one_hangs(here: Here) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    split = shard_head(make(here.device, None, 10), DeviceMesh.from_group(group, here.device))
    over = here.folder / "over"
    start = time.monotonic()
    if here.rank:  # alive and silent until the other has lost patience
        while not over.exists() and time.monotonic() - start < 10 * TIMEOUT:
            time.sleep(0.05)
        return
    with pytest.raises(RuntimeError):
        split.topk(features(here)[here.rows], 2)
    over.touch()
    assert TIMEOUT * 0.9 < time.monotonic() - start < 8 * TIMEOUT


def one_is_killed(here: Here) -> None:
    """In backward: what forward sent has come."""
    split = shard_head(make(here.device, None, 10), here.mesh)
    hidden = features(here)[here.rows].requires_grad_()
    loss = split(hidden, torch.zeros(len(hidden), 10, dtype=torch.bool))
    if here.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        loss.backward()
    assert time.monotonic() - start < GROUP_TIMEOUT / 2


def main(device: str, world: int, rank: int, folder: Path, checks: list[str]) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(str(folder / f"store {world}"), world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT),
    )
    here = Here(device, world, rank, folder, init_device_mesh(device, (world,)))
    report = folder / f"{world} {rank}"
    for name in checks:
        try:
            globals()[name](here)
        except BaseException:
            # The others are not left waiting.
            report.with_suffix(".error").write_text(f"{name}: {traceback.format_exc()}")
            os._exit(1)
        with report.open("a") as done:
            done.write(f"{name}\n")
    os._exit(0)  # a group of which one is dead does not end by itself


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
