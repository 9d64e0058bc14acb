"""A linear classifier whose classes are split over the ranks of a group: each holds, trains and stores its own."""

from __future__ import annotations  # there are builds of torch without process groups

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, layer, shards
from .dtensors import is_dtensor
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

    Rank r of p has the classes :math:`[r \lceil C/p \rceil, (r+1) \lceil C/p \rceil)`, as far as there are; their rows are its parameters
    ``weight`` and ``bias``, plain ones that any optimiser takes. Features are the same on all ranks of the group. Initial values do not
    depend on the number of ranks.

    ``state_dict()`` has the parameters as DTensors: ``torch.distributed.checkpoint`` writes every rank's part and reads it on any other
    number of ranks; :meth:`shard_state_of` does the same for an optimiser. Whole tensors can be loaded too.

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

    _sharded: ClassVar[tuple[str, ...]] = ("weight", "bias")

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
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            _checks.check_integer(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        shards.check_group(group)
        chunk = -(-num_classes // dist.get_world_size(group))
        start = min(dist.get_rank(group) * chunk, num_classes)
        self.in_features, self.num_classes = in_features, num_classes
        self.shard = shards.Shard(group, start, min(chunk, num_classes - start), num_classes)
        self.weight = nn.Parameter(torch.empty(self.shard.size, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.shard.size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()
        self.register_state_dict_post_hook(_as_dtensors)
        self.register_load_state_dict_pre_hook(_as_local)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.shard.group

    @property
    def class_start(self) -> int:
        """The index of this rank's first class."""
        return self.shard.start

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, uniform within 1 / sqrt(D), by a seed that the first rank of the group draws."""
        seed = torch.randint(2**62, ()).to(self.weight.device if self.weight.device.type != "meta" else "cpu")
        seed = shards.all_gather(seed, self.group)[0]
        if self.weight.device.type == "meta":
            return
        bound, size, start = 1 / math.sqrt(self.in_features), self.shard.size, self.shard.start
        for block in range(start // BLOCK, -(-(start + size) // BLOCK)):
            values = torch.empty(BLOCK, self.in_features + 1)  # of whole blocks, whoever has them
            values.uniform_(-bound, bound, generator=torch.Generator().manual_seed(int(seed) + block))
            own = slice(max(start - block * BLOCK, 0), min(start + size - block * BLOCK, BLOCK))
            to = slice(block * BLOCK + own.start - start, block * BLOCK + own.stop - start)
            with torch.no_grad():
                self.weight[to] = values[own, :-1].to(self.weight)
                if self.bias is not None:
                    self.bias[to] = values[own, -1].to(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """The logits (..., C_r) of this rank's classes, for :func:`sharded_large_margin_cross_entropy`; needs memory for all of them."""
        if input.requires_grad and torch.is_grad_enabled():
            input = _SameInput.apply(input, self.group)
        return F.linear(input, self.weight, self.bias)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of features (..., D) and targets (...), without the logits; see :func:`sharded_linear_large_margin_cross_entropy`."""
        return sharded_linear_large_margin_cross_entropy(
            input,
            self.weight,
            target,
            group=self.group,
            class_start=self.class_start,
            num_classes=self.num_classes,
            linear_bias_shard=self.bias,
            **options,
        )

    @torch.no_grad()
    def topk(self, input: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of features (..., D) among all classes and the indices of their classes, (..., k) each, on every rank."""
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be between 1 and the {self.num_classes} classes, got {k}")
        features = input.reshape(-1, input.shape[-1])
        here = min(k, self.shard.size)
        values = features.new_full((len(features), k), -torch.inf)
        classes = torch.zeros_like(values, dtype=torch.int64)
        rows_a_tile = max(1, layer.TILE // max(1, self.shard.size))
        for start in range(0, len(features) if here else 0, rows_a_tile):
            rows = slice(start, start + rows_a_tile)
            values[rows, :here], classes[rows, :here] = F.linear(features[rows], self.weight, self.bias).topk(here)
        candidates = shards.all_gather(values, self.group).transpose(0, 1).flatten(1)
        of_candidates = shards.all_gather(classes + self.class_start, self.group).transpose(0, 1).flatten(1)
        values, best = candidates.topk(k)
        return values.reshape(*input.shape[:-1], k), of_candidates.gather(1, best).reshape(*input.shape[:-1], k)

    def sharded(self, tensor: Tensor) -> Tensor:
        """A tensor (C_r, ...) of this rank's classes, such as a moment of an optimiser, as the DTensor (C, ...) of all, in its memory."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group, tensor.device.type)
        like = torch.empty(self.num_classes, *tensor.shape[1:], device="meta")
        return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())

    def shard_state_of(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on ``optimizer.state_dict()`` has what belongs to this rank's classes as DTensors too, and takes them back."""

        def indices(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            return {i: p for i, p in enumerate(parameters) if any(p is own for own in self.parameters())}

        def give(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state = dict(state_dict["state"])
            for i, parameter in indices(optimizer).items():
                values = state.get(i, {})
                state[i] = {k: self.sharded(v) if torch.is_tensor(v) and v.shape == parameter.shape else v for k, v in values.items()}
            return {**state_dict, "state": {i: values for i, values in state.items() if values}}

        def take(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state = {i: {k: _local(v) for k, v in values.items()} for i, values in state_dict["state"].items()}
            return {**state_dict, "state": state}

        optimizer.register_state_dict_post_hook(give)
        optimizer.register_load_state_dict_pre_hook(take)

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

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...


def _local(value: Any) -> Any:
    return value.to_local() if is_dtensor(value) else value


def _as_dtensors(module: ClassParallelLinear, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    for name in module._sharded:
        if state_dict.get(prefix + name) is not None:
            state_dict[prefix + name] = module.sharded(state_dict[prefix + name])


def _as_local(module: ClassParallelLinear, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    start, size = module.shard.start, module.shard.size
    for name in module._sharded:
        value = state_dict.get(prefix + name)
        if is_dtensor(value):
            state_dict[prefix + name] = value.to_local()
        elif value is not None and len(value) == module.num_classes:  # of one device
            state_dict[prefix + name] = value[start : start + size]


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

    The loss of the gathered rows is one and the same on every rank. The gradient that goes back is that of this rank's rows times the
    number of ranks, by which ``DistributedDataParallel`` divides again when it takes the mean of the network's gradients: so the loss of
    the whole batch trains the network. Every rank has to have the whole gradient of the features, as :meth:`ClassParallelLinear.loss`
    gives it.

    Args:
        tensors: shape ``(N, ...)`` each, N may differ from rank to rank; features, targets.
        group: the ranks.

    Returns:
        One tensor for each, of the rows of all ranks.

    Raises:
        ValueError: tensors of different numbers of rows.

    Example:
        >>> features, labels = gather_rows(network(images), labels, group=group)  # doctest: +SKIP
        >>> loss = head.loss(features, labels)  # doctest: +SKIP

    Source: the features of partial FC go round like this (An et al., CVPR 2022).
    """
    shards.check_group(group)
    num_rows = {len(tensor) for tensor in tensors}
    if len(num_rows) != 1:
        raise ValueError(f"tensors must have the same number of rows, got {', '.join(map(_checks.describe, tensors))}")
    sizes = shards.all_gather(torch.tensor(num_rows.pop(), device=tensors[0].device), group).tolist()
    return tuple(_Gather.apply(tensor, sizes, group) for tensor in tensors)
