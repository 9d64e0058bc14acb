"""Random crops and mirror images of uint8 batches, many times faster than image by image.

A batch is padded, and the rows of all its crops are gathered by one ``index_select`` from a view of overlapping rows, which copies whole
rows of bytes. On the CPU only the mirrored images are then turned round.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LabError


class Moves(NamedTuple):
    """Where in its padded image each crop lies, and whether it is mirrored: int64 tensors (n,)."""

    top: Tensor
    left: Tensor
    mirrored: Tensor  # 0 or 1

    def of(self, own: slice) -> "Moves":
        return Moves(*(part[own] for part in self))


def draw_moves(num_images: int, crop_padding: int, flip: bool, generator: torch.Generator) -> Moves:
    """Each of the ``(2 * crop_padding + 1) ** 2`` crops, and each mirror image if ``flip``, with the same probability."""
    top, left = torch.randint(0, 2 * crop_padding + 1, (2, num_images), generator=generator)
    mirrored = torch.rand(num_images, generator=generator) < 0.5 if flip else torch.zeros(num_images)
    return Moves(top, left, mirrored.long())


def pad(images: Tensor, padding: int, fill: Tensor | None) -> Tensor:
    """``padding`` pixels on each side: ``fill`` (channels,), its fraction cut off, or the image's reflection about its border pixels."""
    n, channels, height, width = images.shape
    padded = images.new_empty(n, channels, height + 2 * padding, width + 2 * padding)
    inner = (slice(padding, padding + height), slice(padding, padding + width))
    if fill is not None:
        padded[:] = fill.to(images.dtype).view(1, channels, 1, 1)
        padded[:, :, *inner] = images
        return padded
    if padding >= min(height, width):
        raise LabError(f"crop_padding {padding} with crop_fill reflect needs larger images than {height}x{width}; give less, or mean")
    padded[:, :, *inner] = images
    rows, left, right = inner[0], padding, padding + width
    padded[:, :, rows, :left] = padded[:, :, rows, left + 1 : 2 * padding + 1].flip(3)
    padded[:, :, rows, right:] = padded[:, :, rows, right - 1 - padding : right - 1].flip(3)
    top, bottom = padding, padding + height
    padded[:, :, :top] = padded[:, :, top + 1 : 2 * padding + 1].flip(2)
    padded[:, :, bottom:] = padded[:, :, bottom - 1 - padding : bottom - 1].flip(2)
    return padded


def apply_moves(images: Tensor, moves: Moves, crop_padding: int, fill: Tensor | None) -> Tensor:
    """The crop of each padded image that ``moves`` says; ``fill`` as :func:`pad` takes it."""
    n, channels, height, width = images.shape
    if crop_padding and n:
        padded = pad(images, crop_padding, fill)
        rows_of_bytes = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
        image, row = torch.arange(n * channels, device=images.device), torch.arange(height, device=images.device)
        line = image.view(n, channels, 1) * padded.shape[2] + moves.top.view(n, 1, 1) + row
        start = line * padded.shape[3] + moves.left.view(n, 1, 1)  # (n, channels, height)
        images = rows_of_bytes.index_select(0, start.flatten()).view(n, channels, height, width)
    return mirror(images, moves.mirrored) if images.is_cpu else mirror_without_counting(images, moves.mirrored)


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """The images, with those turned round whose entry of ``mirrored`` is not 0."""
    turned = mirrored.nonzero().squeeze(1)
    return images.index_copy(0, turned, images.index_select(0, turned).flip(3)) if len(turned) else images


def mirror_without_counting(images: Tensor, mirrored: Tensor) -> Tensor:
    """The same, where the host would have to wait for a device to learn how many there are."""
    return torch.where(mirrored.view(-1, 1, 1, 1) != 0, images.flip(3), images)
