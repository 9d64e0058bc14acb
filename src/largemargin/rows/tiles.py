"""A linear layer whose logits come one tile at a time, and whose gradients are sums over the tiles.

Each tile reads the classifier and adds to its gradient. On the CPU that takes longer than the products if the tile has few rows, so the
tiles of a large classifier have half its size.

Tiles and accumulators are float32 (float64 for float64). On the CPU a layer of half precision is computed in float32. On a GPU its
products take half precision and give float32: the gradient of a tile is rounded to half precision. Two terms would not survive that and
are kept apart: the term that all classes of a row share (of rank one), and the factor of the upstream gradient.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.protocol import Backend
from ..products import linear
from ..rowstats import Cotangents
from .parts import Part, WeightedCotangents, gradient_of

TILE = 15 * 2**20  # numbers in a tile, unless the classifier is large: 60 MiB of float32
TILE_OF_GPU = 2**26  # large, because each tile reads the whole classifier

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of input, weight, bias


class Layer(NamedTuple):
    """``f = x W^T + b`` for all rows x of the input."""

    input: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        # of tiles and accumulators
        return torch.float64 if torch.float64 in (self.input.dtype, self.weight.dtype) else torch.float32

    @property
    def is_half(self) -> bool:
        on_gpu = self.input.device.type in ("cuda", "xpu")
        return on_gpu and self.input.dtype == self.weight.dtype and self.input.dtype in (torch.float16, torch.bfloat16)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.input), len(self.weight)  # of the logits

    def logits(self) -> Tensor:
        """All logits, by operations that compiled code and transforms can take."""
        logits = linear(self.input.to(self.dtype), self.weight.to(self.dtype))
        return logits if self.bias is None else logits + self.bias.to(self.dtype)

    def logits_into(self, tile: Tensor, rows: slice) -> None:
        x = self.input[rows] if self.is_half else self.input[rows].to(self.dtype)
        for classes, weight in self._class_blocks():
            if tile.stride(0) == 1 and len(tile) > 1:
                _add_product(weight, x.t(), tile.t()[classes], 0)
            else:
                _add_product(x, weight.t(), tile[:, classes], 0)
        if self.bias is not None:
            tile += self.bias.to(tile.dtype)

    def times_weight_into(self, product: Tensor, tile: Tensor) -> None:
        if not len(self.weight):
            product.zero_()
        for i, (classes, weight) in enumerate(self._class_blocks()):
            _add_product(tile[:, classes], weight, product, int(i > 0))

    def _class_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The classifier in the dtype of its products: itself, or copies of a few classes at a time."""
        if self.is_half or self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        num_classes, width = self.weight.shape
        block = max(1, TILE // (4 * width))
        for start in range(0, num_classes, block):
            yield slice(start, start + block), self.weight[start : start + block].to(self.dtype)


def _add_product(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
    """``out = beta out + a b``; with a beta of 0, ``out`` may be uninitialised."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cpu:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


class LayerGradients:
    """The gradients of a layer as sums over tiles of its logits; unwanted ones cost nothing.

    If there are fewer rows than features and the classifier needs a gradient, there is no tile: the memory of that gradient holds the
    logits of all rows, class by class, until the gradient overwrites them.

    If the loss of a tile takes the memory of several ``tiles``, each tile is that many times smaller, and the gradient's memory holds none.
    """

    def __init__(self, layer: Layer, wanted: Sequence[bool], tiles: int = 1) -> None:
        num_rows, num_classes = layer.shape
        width, dtype = layer.input.shape[1], layer.dtype
        self.layer = layer
        self.input = torch.empty_like(layer.input, dtype=dtype) if wanted[0] else None
        self.weight = layer.input.new_empty((num_classes, width), dtype=dtype) if wanted[1] else None
        self.bias = layer.input.new_zeros(num_classes, dtype=dtype) if wanted[2] else None
        if self.weight is not None and num_rows == 0:
            self.weight.zero_()

        most = (TILE if layer.input.is_cpu else TILE_OF_GPU) // tiles
        all_of_one_dtype = layer.input.dtype == layer.weight.dtype == dtype
        few_rows = num_rows <= width and num_rows * num_classes > most
        self.in_place = self.weight is not None and few_rows and all_of_one_dtype and tiles == 1
        if layer.input.is_cpu and not layer.is_half:
            most = max(most, layer.weight.numel() // (2 * tiles))
        num_chunks = 1 if self.in_place else max(1, -(-num_rows // max(1, most // max(1, num_classes))))
        self.rows_a_chunk = max(1, -(-num_rows // num_chunks))  # equal sizes make the products faster
        self.one_tile = num_rows <= self.rows_a_chunk
        if self.in_place and self.weight is not None:
            self.workspace = self.weight[:, :num_rows].t()  # (N, C), class by class: the gradient of class c needs only its own logits
        else:
            self.workspace = layer.input.new_empty((min(self.rows_a_chunk, num_rows), num_classes), dtype=dtype)

    def tiles(self, computed: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """A few rows at a time, with their logits; ``computed`` skips the product if a single tile still holds them."""
        num_rows = len(self.layer.input)
        for start in range(0, num_rows, self.rows_a_chunk):
            rows = slice(start, min(start + self.rows_a_chunk, num_rows))
            tile = self.workspace[: rows.stop - rows.start]
            if not (computed and self.one_tile):
                self.layer.logits_into(tile, rows)
            yield rows, tile

    def add(self, rows: slice, tile: Tensor) -> None:
        """Add the contribution of ``tile``, the gradient of the logits of these rows."""
        self._add(rows, tile, tile)

    def _add(self, rows: slice, tile: Tensor, multiplied: Tensor) -> None:
        """``multiplied`` is the tile in the dtype of the products."""
        if self.input is not None:
            self.layer.times_weight_into(self.input[rows], multiplied)
        if self.bias is not None:
            self.bias += tile.sum(0, dtype=self.bias.dtype)
        if self.weight is not None and not self.in_place:
            _add_product(multiplied.t(), self.layer.input[rows].to(multiplied.dtype), self.weight, int(rows.start > 0))

    def add_from_logits(
        self, rows: slice, tile: Tensor, target: Tensor, merged: Part, grads: WeightedCotangents, backend: Backend, weight: Tensor | None
    ) -> None:
        """The same from the logits in ``tile`` and the arguments of :func:`.parts.gradient_of`."""
        self.add(rows, gradient_of(tile, target, weight, merged, grads, backend, tile))

    def finish(self) -> Gradients:
        if self.in_place and self.weight is not None:
            num_rows, num_classes = self.layer.shape
            block = max(1, TILE // num_rows)
            for start in range(0, num_classes, block):
                classes = slice(start, start + block)
                torch.mm(self.weight[classes, :num_rows].clone(), self.layer.input, out=self.weight[classes])
        return self.input, self.weight, self.bias


class HalfLayerGradients(LayerGradients):
    """Gradients by products that take half precision. ``factor``, a part of the upstream gradient, multiplies their results."""

    def __init__(self, layer: Layer, wanted: Sequence[bool], factor: Tensor, tiles: int = 1) -> None:
        super().__init__(layer, wanted, tiles)
        self.factor = factor
        self.gradient = torch.empty_like(self.workspace, dtype=layer.input.dtype)
        kept = torch.ones(layer.shape[1], device=factor.device) if layer.bias is None else (layer.bias != -torch.inf).float()
        self.kept = kept  # 1 for classes in the row
        self.sum_weight = factor.new_empty((1, layer.input.shape[1]), dtype=layer.dtype)
        layer.times_weight_into(self.sum_weight, kept.to(layer.input.dtype).unsqueeze(0))
        self.dense_input = factor.new_zeros(layer.input.shape[1])
        self.dense = factor.new_zeros(())

    def add(self, rows: slice, tile: Tensor) -> None:
        """As for a layer in float32, with ``tile`` rounded to half precision for the products."""
        self._add(rows, tile, self.gradient[: len(tile)].copy_(tile))

    def add_from_logits(
        self, rows: slice, tile: Tensor, target: Tensor, merged: Part, grads: WeightedCotangents, backend: Backend, weight: Tensor | None
    ) -> None:
        """The gradient of the logits is in half precision and O(1). It leaves out ``g_a / K``, which all classes of a row share."""
        g_l, g_e, g_a, _, _ = (torch.zeros_like(merged.max) if grad is None else grad for grad in grads.stats.folded())
        dense = torch.where(merged.num_classes == 0, 0.0, g_a / merged.num_classes.clamp(min=1))
        sparse = grads._replace(stats=Cotangents(log_odds=g_l + g_a, neg_entropy=g_e))
        gradient = gradient_of(tile, target, weight, merged, sparse, backend, self.gradient[: len(tile)])
        on_target = torch.where(merged.num_classes == 0, 0.0, g_l) - dense
        here = (target >= 0).unsqueeze(-1)
        at = target.clamp(min=0).unsqueeze(-1)
        if gradient.shape[1]:
            gradient.scatter_(1, at, torch.where(here, on_target.unsqueeze(-1).to(gradient.dtype), gradient.gather(1, at)))
        self._add(rows, gradient, gradient)
        if self.input is not None:
            self.input[rows].addr_(dense, self.sum_weight[0])
        if self.bias is not None:
            self.dense += dense.sum()
        if self.weight is not None:
            x = self.layer.input[rows].t().to(dense.dtype)
            torch.addmv(self.dense_input, x, dense, out=self.dense_input)  # autocast would round @

    def finish(self) -> Gradients:
        if self.input is not None:
            self.input.mul_(self.factor)
        if self.weight is not None:
            self.weight.addr_(self.kept, self.dense_input).mul_(self.factor)
        if self.bias is not None:
            self.bias.add_(self.kept * self.dense).mul_(self.factor)
        return super().finish()
