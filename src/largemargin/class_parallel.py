"""A linear classifier whose classes are split over the ranks of a group: each holds, trains and stores its own."""

from __future__ import annotations  # there are builds of torch without process groups

import copy
import math
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, layer, plain_layer, shards
from .dtensors import is_dtensor
from .functional import sharded_large_margin_cross_entropy
from .sharded_linear import sharded_linear_large_margin_cross_entropy

BLOCK = 1024  # classes that are initialised together


class _SameInput(torch.autograd.Function):
    """The input itself, whose gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    @shards.once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return shards.all_reduce(gradient.clone(memory_format=torch.contiguous_format), ctx.group), None


class ClassParallelLinear(nn.Module):
    r"""An ``nn.Linear`` with the classes split over ranks, and the large-margin loss of its logits.

    Features are the same on all ranks of the group. Where every rank has rows of its own, :func:`gather_rows` makes them so; then the
    network is under ``DistributedDataParallel``, and this classifier is not: that would make all shards alike. (Over *other* ranks, which
    hold the same classes, it may be.)

    Rank r of p has the classes :math:`[r \lceil C/p \rceil, (r+1) \lceil C/p \rceil)`, as far as there are; their rows are its parameters
    ``weight`` and ``bias``, plain ones that any elementwise optimiser takes. Initial values do not depend on the number of ranks.

    ``state_dict()`` has the parameters as DTensors: ``torch.distributed.checkpoint`` writes every rank's part and reads it on any other
    number of ranks; :meth:`register_optimizer` does the same for an optimiser. Whole tensors, of one device, can be loaded too.

    Args:
        in_features: the width D of the features.
        num_classes: C, of all ranks together.
        bias: whether the classifier has one.
        group: the ranks that share the classes.
        device, dtype: of the parameters.

    Example:
        >>> import torch, largemargin  # one process is a group too
        >>> from torch import distributed
        >>> store = distributed.HashStore()
        >>> distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> head = largemargin.ClassParallelLinear(16, 100, group=distributed.group.WORLD)
        >>> head.loss(torch.randn(8, 16), torch.arange(8)).backward()
        >>> head.weight.grad.shape
        torch.Size([100, 16])
        >>> distributed.destroy_process_group()
    """

    _own_start: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        group: dist.ProcessGroup,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_at_least_1("in_features", in_features)
        _checks.check_at_least_1("num_classes", num_classes)
        shards.check_group(group)
        self.in_features, self.num_classes = in_features, num_classes
        start, stop = self._bounds(dist.get_rank(group), dist.get_world_size(group))
        self.shard = shards.Shard(group, start, stop - start, num_classes)
        self.weight = nn.Parameter(torch.empty(self.shard.size, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.shard.size, device=device, dtype=dtype)) if bias else None
        self._said: set[str] = set()
        self.register_buffer("_own_start", torch.tensor(start, device=self.weight.device), persistent=False)
        self.reset_parameters()
        self.register_state_dict_post_hook(_as_dtensors)
        self.register_load_state_dict_pre_hook(_as_local)

    def _bounds(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """The classes of a rank: those that a DTensor has there."""
        chunk = -(-self.num_classes // num_ranks)
        return min(rank * chunk, self.num_classes), min((rank + 1) * chunk, self.num_classes)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.shard.group

    @property
    def class_start(self) -> int:
        """The index of this rank's first class."""
        return self.shard.start

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, uniform within 1 / sqrt(D), by a seed that the first rank of the group draws."""
        if self.weight.is_meta:
            return
        shape = (self.num_classes, self.in_features, int(self.bias is not None))
        mine = torch.tensor([int(torch.randint(2**62, (), device="cpu")), *shape], device=self.weight.device)
        seeds, *shapes = shards.all_gather(mine, self.group).t().tolist()
        if any(len(set(numbers)) > 1 for numbers in shapes):
            raise ValueError(
                f"(num_classes, in_features, bias) must be the same on all ranks of the group, got {list(zip(*shapes, strict=True))}"
            )
        self._own_start.fill_(self.shard.start)
        bound, size, start = 1 / math.sqrt(self.in_features), self.shard.size, self.shard.start
        for block in range(start // BLOCK, -(-(start + size) // BLOCK) if size else 0):
            values = torch.empty(BLOCK, self.in_features + 1, device="cpu", dtype=torch.float32)  # of whole blocks, whoever has them
            values.uniform_(-bound, bound, generator=torch.Generator("cpu").manual_seed(seeds[0] + block))
            own = slice(max(start - block * BLOCK, 0), min(start + size - block * BLOCK, BLOCK))
            to = slice(block * BLOCK + own.start - start, block * BLOCK + own.stop - start)
            with torch.no_grad():
                self.weight[to] = values[own, :-1].to(self.weight)
                if self.bias is not None:
                    self.bias[to] = values[own, -1].to(self.bias)

    def _check_own(self) -> None:
        """DistributedDataParallel over the group would have written the first rank's numbers to all others, this one among them."""
        if self._own_start.is_cpu and not self._own_start.is_meta and int(self._own_start) != self.shard.start:
            raise RuntimeError(
                "this rank's classes have been overwritten with those of another rank: ClassParallelLinear must not be in a module that "
                "DistributedDataParallel spreads over the ranks of its group; wrap the rest of the network alone"
            )

    def forward(self, input: Tensor) -> Tensor:
        """The logits of features (..., D) as a DTensor (..., C), each rank with its classes; it needs memory for them.

        Any loss of this library takes them; ``full_tensor()`` are those of all classes, ``to_local()`` those of this rank.
        """
        self._check_own()
        if input.requires_grad and torch.is_grad_enabled():
            input = _SameInput.apply(input, self.group)
        return self._as_dtensor(F.linear(input, self.weight, self.bias), input.dim() - 1)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of features (..., D) and targets (...), the same on every rank, without the logits.

        It is always that of the logits that a call of this module gives. With hooks on the module, or in a subclass whose ``forward`` does
        more, the loss makes these logits, and a warning names the cause, once.

        ``options`` (weight, lam, divergence, hard_bias, label_smoothing, ignore_index, reduction, backend) are those of
        :func:`sharded_linear_large_margin_cross_entropy`.
        """
        self._check_own()
        own = plain_layer.weight_and_bias(self, ClassParallelLinear.forward)
        if isinstance(own, str):
            _checks.warn_once(self._said, f"ClassParallelLinear {own}: the loss cannot be fused with it, and is computed from its logits")
            return self._loss_of_logits(input, target, options)
        weight_shard, linear_bias_shard = own
        return sharded_linear_large_margin_cross_entropy(
            input,
            weight_shard,
            target,
            group=self.group,
            class_start=self.class_start,
            num_classes=self.num_classes,
            linear_bias_shard=linear_bias_shard,
            **options,
        )

    def _loss_of_logits(self, input: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        """By a call of this module, with all that hooks and subclasses do in it."""
        loss = sharded_large_margin_cross_entropy(
            self._called(input).flatten(0, -2),
            target.reshape(-1),
            group=self.group,
            class_start=self.class_start,
            num_classes=self.num_classes,
            **options,
        )
        return loss.reshape(target.shape) if loss.dim() else loss

    def _called(self, input: Tensor) -> Tensor:
        """The logits of this rank's classes, (..., C_r), by a call of this module."""
        from torch.distributed.tensor import Shard

        logits: Any = self(input)
        return logits.redistribute(placements=[Shard(logits.dim() - 1)]).to_local()  # type: ignore[no-any-return]

    @torch.no_grad()
    def topk(self, input: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of features (..., D) among all classes, and these classes, (..., k) each.

        The features are the same on every rank, and so is what it returns.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be between 1 and the {self.num_classes} classes, got {k}")
        features = input.reshape(-1, input.shape[-1])
        num_ranks = dist.get_world_size(self.group)
        mine = torch.tensor([len(features)], device=features.device)
        shards.check_same_number_of_rows(shards.all_gather(mine, self.group).flatten().tolist())
        bounds = [self._bounds(rank, num_ranks) for rank in range(num_ranks)]
        here = min(k, self.shard.size)
        values = features.new_zeros((len(features), min(k, bounds[0][1])))
        classes = torch.zeros_like(values, dtype=torch.int64)
        rows_a_tile = max(1, layer.TILE // max(1, self.shard.size))
        own = plain_layer.weight_and_bias(self, ClassParallelLinear.forward)
        called = self._called(features) if isinstance(own, str) else None
        for start in range(0, len(features) if here else 0, rows_a_tile):
            rows = slice(start, start + rows_a_tile)
            logits = F.linear(features[rows], *own) if called is None else called[rows]
            values[rows, :here], classes[rows, :here] = logits.topk(here)
        of_ranks = [min(k, stop - start) for start, stop in bounds]  # what each has to offer
        candidates, classes = (
            torch.cat([found[:, :n] for found, n in zip(shards.all_gather(offer, self.group), of_ranks, strict=True)], dim=1)
            for offer in (values, classes + self.class_start)
        )
        values, best = candidates.topk(k)
        return values.reshape(*input.shape[:-1], k), classes.gather(1, best).reshape(*input.shape[:-1], k)

    def clip_grad_norm_(self, others: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clip the gradients of this classifier and of ``others``, the parameters that all ranks have alike, by their norm together.

        :func:`torch.nn.utils.clip_grad_norm_` knows the classes of one rank alone: every rank would clip differently. Returns the norm.
        """
        own, others = list(self.parameters()), list(others)
        square = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square().to(self.weight.device)
        of_others = nn.utils.get_total_norm([p.grad for p in others if p.grad is not None]).to(square.device)
        norm = (shards.all_reduce(square.float(), self.group) + of_others.float().square()).sqrt()
        nn.utils.clip_grads_with_norm_([*own, *others], max_norm, norm)
        return norm

    def _as_dtensor(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """What this rank has along the classes as the DTensor of all, in the same memory."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group, tensor.device.type)
        like = torch.empty(*tensor.shape[:dim], self.num_classes, *tensor.shape[dim + 1 :], device="meta")
        return DTensor.from_local(tensor, mesh, [Shard(dim)], run_check=False, shape=like.shape, stride=like.stride())

    def _own(self, name: str, value: Any) -> Any:
        """Of a DTensor or whole tensor the part of this rank."""
        if not torch.is_tensor(value) or value.dim() == 0:
            return value
        if len(value) != self.num_classes:
            raise ValueError(
                f"{name} must be a DTensor or a whole tensor of all {self.num_classes} classes, got {_checks.describe(value)}; "
                "ClassParallelLinear takes no single shards"
            )
        if is_dtensor(value):
            local = value.to_local()
            if len(local) == self.shard.size and len(value.placements) == 1 and value.placements[0].is_shard(0):
                return local
            value = value.full_tensor()
        return value[self.shard.start : self.shard.start + self.shard.size].clone()

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on ``optimizer.state_dict()`` has what belongs to this rank's classes as DTensors too, and takes them back.

        For optimisers whose state has the shape of the parameters, or is a number.
        """

        def own(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            keys = [key for group in state_dict["param_groups"] for key in group["params"]]  # in the same order
            return {key: p for key, p in zip(keys, parameters, strict=False) if any(p is own for own in self.parameters())}

        def give(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state = dict(state_dict["state"])
            for key, parameter in own(optimizer, state_dict).items():
                if key in state:
                    state[key] = {name: self._given(name, value, parameter) for name, value in state[key].items()}
            return {**state_dict, "state": state}

        def take(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state = dict(state_dict["state"])
            for key in own(optimizer, state_dict):
                if key in state:
                    state[key] = {name: self._own(name, value) for name, value in state[key].items()}
            return {**state_dict, "state": state}

        optimizer.register_state_dict_post_hook(give)
        optimizer.register_load_state_dict_pre_hook(take)

    def _given(self, name: str, value: Any, parameter: Tensor) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0 or is_dtensor(value):
            return value
        if value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser's {name} must have the shape of its parameter, {tuple(parameter.shape)}, got {tuple(value.shape)}; "
                "a factored state cannot be split by classes"
            )
        return self._as_dtensor(value)

    def extra_repr(self) -> str:
        start, size = self.shard.start, self.shard.size
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, here [{start}, {start + size}), bias={self.bias is not None}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassParallelLinear:
        memo[id(self.shard.group)] = self.shard.group  # a group is not to be copied
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "ClassParallelLinear cannot be pickled, its group is of this process; save its state_dict() by torch.distributed.checkpoint"
        )

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...


def _as_dtensors(module: ClassParallelLinear, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    for name in ("weight", "bias"):
        if state_dict.get(prefix + name) is not None:
            state_dict[prefix + name] = module._as_dtensor(state_dict[prefix + name])


def _as_local(module: ClassParallelLinear, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name in ("weight", "bias"):
        if state_dict.get(prefix + name) is not None:
            state_dict[prefix + name] = module._own(name, state_dict[prefix + name])


class _Gather(torch.autograd.Function):
    """Of shares of different size, with padding on the way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.rank = sizes, dist.get_rank(group)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = shards.all_gather(padded, group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @shards.once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.split(ctx.sizes)[ctx.rank] * len(ctx.sizes), None, None


def gather_rows(*tensors: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """The rows of all ranks, in their order: for a batch split over the same ranks as the classes.

    For networks under ``DistributedDataParallel`` over the same ranks: the gradient that goes back is that of this rank's rows times the
    number of ranks, by which DDP divides again when it takes the mean of the network's gradients. So the loss of the whole batch, which is
    one and the same on every rank, trains the network. (Without DDP, divide by the number of ranks yourself.)

    Args:
        tensors: shape ``(N, ...)`` each, N may differ from rank to rank; features, targets.
        group: the ranks.

    Returns:
        One tensor for each, of the rows of all ranks.

    Raises:
        ValueError: tensors of different numbers of rows, or of another shape or dtype on another rank.

    Example:
        >>> features, labels = gather_rows(network(images), labels, group=group)  # doctest: +SKIP
        >>> loss = head.loss(features, labels)  # doctest: +SKIP

    Source: the features of partial FC go round like this (An et al., CVPR 2022).
    """
    shards.check_group(group)
    num_rows = {len(tensor) if tensor.dim() else -1 for tensor in tensors}
    if len(num_rows) != 1 or -1 in num_rows:
        raise ValueError(f"tensors must have the same number of rows, got {', '.join(map(_checks.describe, tensors)) or 'none'}")
    kind = [(str(tensor.dtype), tuple(tensor.shape[1:])) for tensor in tensors]
    mine = torch.tensor([num_rows.pop(), zlib.crc32(repr(kind).encode())], device=tensors[0].device)
    sizes, kinds = shards.all_gather(mine, group).t().tolist()
    if len(set(kinds)) > 1:
        raise ValueError(f"tensors must have the same dtypes and shapes on all ranks but for their rows, got here {kind}")
    return tuple(_Gather.apply(tensor, sizes, group) for tensor in tensors)
