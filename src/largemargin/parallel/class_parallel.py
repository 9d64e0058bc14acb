"""A linear classifier whose classes are split over the ranks of a group: each rank holds, trains and stores its own."""

from __future__ import annotations  # there are builds of torch without process groups

import copy
import math
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, plain_layer
from ..functional import sharded_large_margin_cross_entropy, sharded_linear_large_margin_cross_entropy
from ..rows import collectives, tiles
from ..tracing import no_script, refuse_script

BLOCK = 1024  # classes initialised together


class _SameInput(torch.autograd.Function):
    """The input itself; its gradient is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    @collectives.once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(gradient.clone(memory_format=torch.contiguous_format), ctx.group), None


class ClassParallelLinear(nn.Module):
    r"""An ``nn.Linear`` with the classes split over ranks, and the large-margin loss of its logits.

    Features must be the same on all ranks of the group. If every rank has its own rows, use :func:`gather_rows`. Then wrap the network in
    ``DistributedDataParallel``, but not this classifier: DDP would make all shards equal. (DDP over *other* ranks is fine.)

    Rank r of p has the classes :math:`[r \lceil C/p \rceil, (r+1) \lceil C/p \rceil)`, up to C. Their rows are its plain parameters
    ``weight`` and ``bias``, for any elementwise optimiser. Initial values do not depend on the number of ranks.

    ``state_dict()`` has the parameters as DTensors: ``torch.distributed.checkpoint`` writes every rank's part and reads it on any number of
    ranks. :meth:`register_optimizer` does the same for an optimiser. Whole tensors of one device can be loaded too.

    Args:
        in_features, num_classes: the width D of the features, and C on all ranks together.
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

    __prepare_scriptable__ = refuse_script
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
        collectives.check_group(group)
        self.in_features, self.num_classes = in_features, num_classes
        start, stop = self._bounds(dist.get_rank(group), dist.get_world_size(group))
        self.shard = collectives.Shard(group, start, stop - start, num_classes)
        self.weight = nn.Parameter(torch.empty(self.shard.size, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.shard.size, device=device, dtype=dtype)) if bias else None
        self._said: set[str] = set()
        self.register_buffer("_own_start", torch.tensor(start, device=self.weight.device), persistent=False)
        self.reset_parameters()
        self.register_state_dict_post_hook(_as_dtensors)
        self.register_load_state_dict_pre_hook(_as_local)

    def _bounds(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """The classes of a rank, as a DTensor splits them."""
        chunk = -(-self.num_classes // num_ranks)
        return min(rank * chunk, self.num_classes), min((rank + 1) * chunk, self.num_classes)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.shard.group

    @property
    def class_start(self) -> int:
        return self.shard.start

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear``, uniform within 1 / sqrt(D), with a seed that the first rank of the group draws."""
        if self.weight.is_meta:
            return
        shape = (self.num_classes, self.in_features, int(self.bias is not None))
        mine = torch.tensor([int(torch.randint(2**62, (), device="cpu")), *shape], device=self.weight.device)
        seeds, *shapes = collectives.all_gather(mine, self.group).t().tolist()
        if any(len(set(numbers)) > 1 for numbers in shapes):
            raise ValueError(f"(num_classes, in_features, bias) must be the same on all ranks, got {list(zip(*shapes, strict=True))}")
        self._own_start.fill_(self.shard.start)
        bound, size, start = 1 / math.sqrt(self.in_features), self.shard.size, self.shard.start
        for block in range(start // BLOCK, -(-(start + size) // BLOCK) if size else 0):
            values = torch.empty(BLOCK, self.in_features + 1, device="cpu", dtype=torch.float32)  # whole blocks, for any number of ranks
            values.uniform_(-bound, bound, generator=torch.Generator("cpu").manual_seed(seeds[0] + block))
            own = slice(max(start - block * BLOCK, 0), min(start + size - block * BLOCK, BLOCK))
            to = slice(block * BLOCK + own.start - start, block * BLOCK + own.stop - start)
            with torch.no_grad():
                self.weight[to] = values[own, :-1].to(self.weight)
                if self.bias is not None:
                    self.bias[to] = values[own, -1].to(self.bias)

    def _check_own(self) -> None:
        """Raise if DistributedDataParallel over the group has written the first rank's numbers to this rank."""
        if self._own_start.is_cpu and not self._own_start.is_meta and int(self._own_start) != self.shard.start:
            raise RuntimeError(
                "another rank's classes have overwritten the classes of this rank: ClassParallelLinear must not be in a module that "
                "DistributedDataParallel spreads over the ranks of its group; wrap only the rest of the network"
            )

    def forward(self, input: Tensor) -> Tensor:
        """The logits of features (..., D) as a DTensor (..., C), each rank with its classes. Any loss of this library takes them."""
        self._check_own()
        _checks.check_alike(input=input, weight=self.weight)
        if input.requires_grad and torch.is_grad_enabled():
            input = _SameInput.apply(input, self.group)
        return self._as_dtensor(F.linear(input, self.weight, self.bias), input.dim() - 1)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The loss of features (..., D) and class indices (...), the same on every rank, without storing the logits.

        ``target`` may also hold the probabilities (..., C_r) of this rank's classes.

        With hooks on the module, or another ``forward`` in a subclass, the loss stores the logits; a warning names the cause, once.
        ``options`` are the options and ``weight`` of :func:`sharded_linear_large_margin_cross_entropy`.
        """
        self._check_own()
        own = plain_layer.weight_and_bias(self, ClassParallelLinear.forward)
        if isinstance(own, str):
            _checks.warn_once(self._said, f"ClassParallelLinear {own}: the loss cannot be fused with it, so it is computed from its logits")
            return self._loss_of_logits(input, target, options)
        weight, bias = own
        return sharded_linear_large_margin_cross_entropy(input, weight, target, **self._place, linear_bias_shard=bias, **options)

    @property
    def _place(self) -> dict[str, Any]:
        """The place of this rank's classes, for the functions of sharded losses."""
        return {"group": self.group, "class_start": self.class_start, "num_classes": self.num_classes}

    def _loss_of_logits(self, input: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss by a call of this module, with the effects of hooks and subclasses."""
        logits = self._called(input).flatten(0, -2)
        target = target.reshape(len(logits), *target.shape[input.dim() - 1 :])
        loss = sharded_large_margin_cross_entropy(logits, target, **self._place, **options)
        return loss.reshape(input.shape[:-1]) if loss.dim() else loss

    def _called(self, input: Tensor) -> Tensor:
        """The logits of this rank's classes, (..., C_r), by a call of this module."""
        from torch.distributed.tensor import Shard

        logits: Any = self(input)
        return logits.redistribute(placements=[Shard(logits.dim() - 1)]).to_local()  # type: ignore[no-any-return]

    @torch.no_grad()
    def topk(self, input: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits of features (..., D) among all classes, and their classes, (..., k) each; the same on every rank."""
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be between 1 and the {self.num_classes} classes, got {k}")
        _checks.check_alike(input=input, weight=self.weight)
        features = input.reshape(-1, input.shape[-1])
        num_ranks = dist.get_world_size(self.group)
        mine = torch.tensor([len(features)], device=features.device)
        collectives.check_same_number_of_rows(collectives.all_gather(mine, self.group).flatten().tolist())
        bounds = [self._bounds(rank, num_ranks) for rank in range(num_ranks)]
        here = min(k, self.shard.size)
        values = features.new_zeros((len(features), min(k, bounds[0][1])))
        classes = torch.zeros_like(values, dtype=torch.int64)
        rows_a_tile = max(1, tiles.TILE // max(1, self.shard.size))
        own = plain_layer.weight_and_bias(self, ClassParallelLinear.forward)
        called = self._called(features) if isinstance(own, str) else None
        for start in range(0, len(features) if here else 0, rows_a_tile):
            rows = slice(start, start + rows_a_tile)
            logits = F.linear(features[rows], *own) if called is None else called[rows]
            values[rows, :here], classes[rows, :here] = logits.topk(here)
        of_ranks = [min(k, stop - start) for start, stop in bounds]  # candidates of each rank
        candidates, classes = (
            torch.cat([found[:, :n] for found, n in zip(collectives.all_gather(offer, self.group), of_ranks, strict=True)], dim=1)
            for offer in (values, classes + self.class_start)
        )
        values, best = candidates.topk(k)
        return values.reshape(*input.shape[:-1], k), classes.gather(1, best).reshape(*input.shape[:-1], k)

    def clip_grad_norm_(self, others: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clip the gradients of this classifier and of ``others``, parameters equal on all ranks, by their common norm, and return it.

        :func:`torch.nn.utils.clip_grad_norm_` sees only one rank's classes, so every rank would clip differently.
        """
        own, others = list(self.parameters()), list(others)
        square = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square().to(self.weight.device)
        of_others = nn.utils.get_total_norm([p.grad for p in others if p.grad is not None]).to(square.device)
        norm = (collectives.all_reduce(square.float(), self.group) + of_others.float().square()).sqrt()
        nn.utils.clip_grads_with_norm_([*own, *others], max_norm, norm)
        return norm

    def _as_dtensor(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The slice of this rank along ``dim`` as the DTensor of all classes, in the same memory."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group, tensor.device.type)
        like = torch.empty(*tensor.shape[:dim], self.num_classes, *tensor.shape[dim + 1 :], device="meta")
        return DTensor.from_local(tensor, mesh, [Shard(dim)], run_check=False, shape=like.shape, stride=like.stride())

    def _own(self, name: str, value: Any) -> Any:
        """The part of this rank in a DTensor or whole tensor."""
        if not torch.is_tensor(value) or value.dim() == 0:
            return value
        if len(value) != self.num_classes:
            raise ValueError(
                f"{name} must have all {self.num_classes} classes, as a DTensor or whole tensor, got {_checks.describe(value)}"
            )
        if _checks.is_dtensor(value):
            local = value.to_local()
            if len(local) == self.shard.size and len(value.placements) == 1 and value.placements[0].is_shard(0):
                return local
            value = value.full_tensor()
        return value[self.shard.start : self.shard.start + self.shard.size].clone()

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make ``optimizer.state_dict()`` give and take the state of this classifier as DTensors.

        Each entry of the state must be a number or have the shape of its parameter.
        """

        def own(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            keys = [key for group in state_dict["param_groups"] for key in group["params"]]  # in the same order
            return {key: p for key, p in zip(keys, parameters, strict=False) if any(p is own for own in self.parameters())}

        def hook(
            convert: Callable[[str, Any, Tensor], Any], optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
        ) -> dict[str, Any]:
            state = dict(state_dict["state"])
            for key, parameter in own(optimizer, state_dict).items():
                if key in state:
                    state[key] = {name: convert(name, value, parameter) for name, value in state[key].items()}
            return {**state_dict, "state": state}

        optimizer.register_state_dict_post_hook(partial(hook, self._given))
        optimizer.register_load_state_dict_pre_hook(partial(hook, lambda name, value, _: self._own(name, value)))

    def _given(self, name: str, value: Any, parameter: Tensor) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0 or _checks.is_dtensor(value):
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
        memo[id(self.shard.group)] = self.shard.group  # a group cannot be copied
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "ClassParallelLinear cannot be pickled, because its group cannot; save its state_dict() with torch.distributed.checkpoint"
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
    """Gather shares of different sizes, with padding."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.rank = sizes, dist.get_rank(group)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = collectives.all_gather(padded, group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @collectives.once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.split(ctx.sizes)[ctx.rank] * len(ctx.sizes), None, None


@no_script
def gather_rows(*tensors: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """The rows of all ranks, in rank order, for a batch split over the same ranks as the classes.

    The network should be under ``DistributedDataParallel`` over the same ranks. The backward pass multiplies the gradient of this rank's
    rows by the number of ranks, because DDP divides the network's gradients by it. So the loss of the whole batch, equal on every rank,
    trains the network. (Without DDP, divide by the number of ranks yourself.)

    Args:
        tensors: features, targets and so on, shape ``(N, ...)`` each; N may differ between ranks.
        group: the ranks.

    Returns:
        One tensor for each of ``tensors``, with the rows of all ranks.

    Raises:
        ValueError: tensors have different numbers of rows, or another shape or dtype on another rank.

    Example:
        >>> features, labels = gather_rows(network(images), labels, group=group)  # doctest: +SKIP
        >>> loss = head.loss(features, labels)  # doctest: +SKIP

    Source: partial FC gathers features in this way (An et al., CVPR 2022).
    """
    collectives.check_group(group)
    num_rows = {len(tensor) if tensor.dim() else -1 for tensor in tensors}
    if len(num_rows) != 1 or -1 in num_rows:
        raise ValueError(f"tensors must have the same number of rows, got {', '.join(map(_checks.describe, tensors)) or 'none'}")
    kind = [(str(tensor.dtype), tuple(tensor.shape[1:])) for tensor in tensors]
    mine = torch.tensor([num_rows.pop(), zlib.crc32(repr(kind).encode())], device=tensors[0].device)
    sizes, kinds = collectives.all_gather(mine, group).t().tolist()
    if len(set(kinds)) > 1:
        raise ValueError(f"tensors must have the same dtypes and shapes on all ranks except for their rows, got {kind} here")
    return tuple(_Gather.apply(tensor, sizes, group) for tensor in tensors)
