"""A head whose labels are split over processes: each has the weights of some labels, and takes the losses of all rows.

The rows of all processes come together (all-gather), each process computes loss and gradients of its labels, and the
gradient of the rows goes back to whose they are (reduce-scatter). Targets go where their labels are (all-to-all).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.functional import pad

from .functional.checks import check_index, check_no_gradient
from .functional.layer import as_layer
from .head import MultiLabelHead, TopK, above, greatest, greatest_of, run_step, trained
from .ops.chunks import Layer
from .ops.linear import Call, linear_loss
from .ops.operands import as_matrices
from .ops.passes import denominator, is_counted
from .ops.ranks import Ranks, exchange, itself
from .ops.sparse import by_chunk
from .optim import HeadSGD
from .targets import SparseLabels


def shard_head(
    head: MultiLabelHead, mesh: DeviceMesh, dim: str | int | None = None, *, same_rows: bool = False
) -> ShardedHead:
    """A head of which every process has some labels, as it were one head that is given the rows of all processes.

    Every process of the mesh dimension calls it, and then each method, in the same order. Weights are those of the
    dimension's first process, which scatters them. A head that is too large for one is made on the meta device, split,
    given memory by ``to_empty``, and loaded from a checkpoint.

    Args:
        head: what is split; it stays as it is.
        mesh: the processes. Where it has other dimensions, the head is replicated over them, and the caller averages
            its gradients there.
        dim: of the mesh, by name or number; ``None`` where there is but one.
        same_rows: whether all processes hold the same rows, as tensor-parallel encoders do, and not each its own.

    Returns:
        A :class:`ShardedHead`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been sent then.

    Example::

        >>> import torch, torch.distributed as dist
        >>> from bertloss_fast import MultiLabelHead
        >>> from bertloss_fast.distributed import shard_head
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> head = shard_head(MultiLabelHead(8, num_labels=1000), mesh)
        >>> head(torch.randn(2, 8), torch.zeros(2, 1000, dtype=torch.bool)).backward()
        >>> dist.destroy_process_group()
    """
    if not isinstance(head, MultiLabelHead):
        raise TypeError(f"head: expected a MultiLabelHead, got {type(head).__name__}")
    if isinstance(head.weight, DTensor):
        raise ValueError(f"head: expected one that is not split yet, got a {type(head).__name__} of DTensors")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    if head.loss.reduction == "none":
        raise ValueError("reduction: expected a loss that is reduced to one number, got 'none'")
    if same_rows and head.dropout.p:
        raise ValueError(
            "same_rows: expected False with dropout, which would make other rows of them on every process; got True"
        )
    return ShardedHead(head, mesh, _mesh_dim(mesh, dim), same_rows)


def _mesh_dim(mesh: DeviceMesh, dim: str | int | None) -> int:
    names = mesh.mesh_dim_names or ()
    expected = f"one of the mesh's {mesh.ndim} dimensions{''.join(f', {name!r}' for name in names)}"
    if dim is None and mesh.ndim == 1:
        return 0
    if dim is None or (isinstance(dim, str) and dim not in names):
        raise ValueError(f"dim: expected {expected}, got {dim!r}")
    number = names.index(dim) if isinstance(dim, str) else check_index("dim", dim, expected)
    if not 0 <= number < mesh.ndim:
        raise ValueError(f"dim: expected {expected}, got {dim}")
    return number


class ShardedHead(MultiLabelHead):
    """A :class:`MultiLabelHead` whose labels are split over processes; :func:`shard_head` makes one.

    ``weight`` and ``bias`` are DTensors with ``Shard(0)``, and their gradients too: an optimizer updates what is local,
    and ``torch.distributed.checkpoint`` saves them and loads them into any number of processes, or a head that is
    whole. A process may have no labels.

    Each process gives its own rows, maybe none, and gets the labels and gradients of these. The loss is that of all
    rows, the same on every process, and a mean divides by all that counts; ``normalizer`` and the upstream gradient
    have to be the same too. Where gloo connects them, a process that dies makes the others raise at once, and one that
    hangs after the process group's timeout; so does one whose arguments alone do not fit. Each call waits for the
    device, to know how many rows the others have.

    The gradients are those of this one loss. The head's own are whole, and it stays outside of
    DistributedDataParallel. That of an encoder's weights is the sum of what the processes have, of which
    DistributedDataParallel takes the mean: give it the gradient of hidden times the size of the mesh dimension, by
    ``hidden.register_hook(lambda gradient: gradient * size)``, or by ``loss_scale=size`` in :meth:`fused_step`. To
    multiply the loss would be wrong, since the head's gradients would be multiplied too. With ``same_rows`` every
    process has the whole gradient of hidden, and there is nothing to multiply.

    Of a :class:`HeadSGD` the momenta are those of the local labels: its state is for the same number of processes.
    """

    def __init__(self, head: MultiLabelHead, mesh: DeviceMesh, mesh_dim: int, same_rows: bool = False) -> None:
        nn.Module.__init__(self)  # MultiLabelHead's makes weights
        self.in_features, self.num_labels, self.chunk_size = head.in_features, head.num_labels, head.chunk_size
        self._prior = head._prior
        # A DTensor may have another mesh of the same processes, whose groups have other timeouts.
        self.mesh, self.mesh_dim, self.same_rows = mesh, mesh_dim, same_rows
        placements: list[Placement] = [Replicate()] * mesh.ndim
        placements[mesh_dim] = Shard(0)
        for name in ("weight", "bias"):
            whole = getattr(head, name)
            if whole is not None:
                whole = nn.Parameter(distribute_tensor(whole.detach(), mesh, placements), whole.requires_grad)
            self.register_parameter(name, whole)
        self.dropout, self.loss = copy.deepcopy(head.dropout), copy.deepcopy(head.loss).to(mesh.device_type)
        self.train(head.training)

    def forward(self, hidden: Tensor, targets: Tensor | SparseLabels | None = None, **options: Any) -> Tensor:
        """The loss of the rows of all processes, the same on each."""
        if targets is None:
            raise TypeError("targets: expected labels, got None, and no process has all logits; topk has the greatest")
        self._check(hidden)
        call, ranks = self._call(self.dropout(hidden), targets, options)
        return exchange(linear_loss(call), ranks.sum, itself)

    def _step(
        self, hidden: Tensor, targets: Tensor | SparseLabels, optimizer: HeadSGD, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if self.mesh.ndim > 1:
            raise ValueError(
                f"mesh: expected one dimension, since a fused step has no gradient to average over another; "
                f"got {self.mesh.ndim}"
            )
        call, ranks = self._call(hidden.detach(), targets, options)
        with torch.no_grad():
            parameters = {name: cast(DTensor, value).to_local() for name, value in trained(self).items()}
        loss, gradient = run_step(call, optimizer.begin(parameters, shard=ranks.rank))
        return ranks.sum(loss), ranks.sum_of_own(gradient).view(hidden.shape)

    def _greatest(self, hidden: Tensor, k: int) -> TopK:
        layer, ranks, _ = self._together(self._layer(hidden), f"topk {k}")
        own, widths = ranks.rows[ranks.rank], [min(k, labels) for labels in ranks.labels]

        def to_owners(values: Tensor) -> Tensor:
            sizes = [own * width for width in widths]
            parts = torch.split(ranks.to_owners(values, ranks.rows, sizes), sizes)
            return torch.cat([part.view(own, width) for part, width in zip(parts, widths, strict=True)], 1)

        found = greatest(layer, k)
        return greatest_of(to_owners(found.scores), to_owners(found.labels + ranks.mine.start), k)

    def _above(self, hidden: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer, ranks, _ = self._together(self._layer(hidden), "predict")
        row, col, scores = above(layer, threshold.expand(1, self.num_labels)[:, ranks.mine])
        row, order = row.sort(stable=True)
        firsts, rows = (torch.tensor(counts, device=row.device) for counts in (ranks.first_rows, ranks.rows))
        table = ranks.table(torch.searchsorted(row, firsts + rows) - torch.searchsorted(row, firsts))
        received = [line[ranks.rank] for line in table]
        found = (row, (col + ranks.mine.start)[order], scores[order])
        row, col, scores = (ranks.to_owners(values, table[ranks.rank], received) for values in found)
        return row - ranks.first_rows[ranks.rank], col, scores

    def _layer(self, hidden: Tensor) -> Layer:
        return as_layer(hidden, *self._stand_ins(), self.chunk_size)[0]

    def _stand_ins(self) -> tuple[Tensor, Tensor | None]:
        """Of the whole weight's and bias's shapes, to check a call by; they take no memory."""
        weight, bias = (
            None if whole is None else torch.empty((), dtype=whole.dtype, device=whole.device).expand(whole.shape)
            for whole in (self.weight, self.bias)
        )
        return cast(Tensor, weight), bias

    def _ranks(self) -> Ranks:
        mesh, dim = self.mesh, self.mesh_dim
        size = mesh.size(dim)
        step = -(-self.num_labels // size)  # as torch.chunk cuts, and so DTensor
        labels = [min(max(self.num_labels - rank * step, 0), step) for rank in range(size)]
        return Ranks(mesh.get_group(dim), mesh.get_local_rank(dim), self.same_rows, labels, [])

    def _together(self, layer: Layer, what: str, counts: Tensor | None = None) -> tuple[Layer, Ranks, list[list[int]]]:
        """The layer of all rows and of this process's labels; and every process's ``counts``."""
        weight, bias = cast(DTensor, self.weight), cast("DTensor | None", self.bias)
        inputs = layer.inputs.reshape(-1, self.in_features)
        ranks, table = self._ranks().meet(inputs, what, counts)
        layer = layer._replace(
            inputs=exchange(inputs, ranks.gather, ranks.sum_of_own),
            linear_weight=weight.to_local(),
            linear_bias=None if bias is None else bias.to_local(),
        )
        return layer, ranks, table

    def _call(self, hidden: Tensor, targets: Tensor | SparseLabels, options: dict[str, Any]) -> tuple[Call, Ranks]:
        """The loss of all rows and of this process's labels, over what counts on all processes."""
        weight, bias = self._stand_ins()
        call = self.loss.linear_call(hidden, weight, targets, bias, self.chunk_size, options)
        check_no_gradient("targets", call.operands.targets)
        given, own = call.operands, as_matrices(call.operands)
        crow, col, chunks, counts = own.crow, own.col, None, None
        if crow is not None and col is not None:
            labels = self._ranks().labels
            chunks = by_chunk(crow, col, self.num_labels, labels[0])
            counts = pad(chunks.crow[:, -1] - chunks.crow[:, 0], (0, len(labels) - len(chunks.crow)))
        kinds = {name: operand.dtype for name, operand in given._asdict().items() if operand is not None}
        layer, ranks, table = self._together(call.layer, f"a loss of {kinds}", counts)
        if chunks is not None:
            in_rows = pad(chunks.crow.diff(), (0, 0, 0, len(ranks.labels) - len(chunks.crow)))
            crow = pad(ranks.to_labels(in_rows.unbind(), ranks.rows).cumsum(0), (1, 0))
            col = ranks.to_labels(torch.split(chunks.col, table[ranks.rank]), [line[ranks.rank] for line in table])

        def of_labels(vector: Tensor | None) -> Tensor | None:
            return vector if vector is None or vector.shape != (self.num_labels,) else vector[ranks.mine]

        is_matrix = given.weight is not None and given.weight.dim() > 1
        operands = own._replace(
            inputs=hidden.new_empty((), dtype=layer.logits_dtype).expand(len(layer.inputs), ranks.labels[ranks.rank]),
            targets=ranks.columns(own.targets),
            crow=crow,
            col=col,
            alpha=of_labels(given.alpha),
            weight=ranks.columns(own.weight) if is_matrix else of_labels(given.weight),
            pos_weight=of_labels(given.pos_weight),
            sample_weight=ranks.of_rows(own.sample_weight),
            mask=ranks.columns(own.mask),
        )
        # Whether labels are soft was asked of this process's rows.
        call = call._replace(spec=call.spec._replace(soft=None), operands=operands, layer=layer)
        return call._replace(operands=operands._replace(normalizer=self._denominator(call, ranks))), ranks

    def _denominator(self, call: Call, ranks: Ranks) -> Tensor | None:
        spec, operands = call.spec, call.operands
        if spec.reduction == "sum" or operands.normalizer is not None:
            return cast("Tensor | None", operands.normalizer)
        if spec.reduction == "mean_positive" or is_counted(spec, operands):
            count = denominator(spec, operands, call.backend, at_least=0) if operands.inputs.numel() else 0
            count = torch.as_tensor(count, dtype=spec.compute_dtype, device=call.layer.inputs.device)
            return ranks.sum(count).clamp_min(1)
        number = len(call.layer.inputs) * (self.num_labels if spec.reduction == "mean" else 1)
        return call.layer.inputs.new_full((), max(number, 1), dtype=spec.compute_dtype)
