"""From the file of an image to its pixels, as a viewer shows them."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torchvision import import_torchvision
from ..errors import LabError
from ..files import lost_link

NAMED = 10  # broken files in a message; the others are counted

OnImage = Callable[[int, int], object]  # hears how many images of how many are decoded


class Picture(NamedTuple):
    """A PIL image in RGB, and what had to be done for it."""

    image: Any
    turned: bool  # as its EXIF orientation says
    was_transparent: bool  # somewhere: it lies on white
    has_more: bool  # frames or pages in its file, of which it is the first


class Decoded(NamedTuple):
    """Images (N, 3, size, size) uint8, and what there is to say of them."""

    images: Tensor
    digests: list[bytes]  # of the pixels of each whole image
    turned: int
    transparent: int
    cut: int  # files of several frames or pages


def read_image(path: Path) -> Picture:
    """The picture in a file as a viewer shows it."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return shown(file)
    except Exception as error:  # PIL raises many types for a broken file
        empty = "empty file" if path.is_file() and path.stat().st_size == 0 else ""
        reason = lost_link(path) or empty or str(error) or type(error).__name__
        raise LabError(f"cannot read the image {path}: {reason}; mend or remove it") from error


def shown(image: Any) -> Picture:
    """What a viewer shows of a PIL image, opened or made; raises ValueError where that would lose bits."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
    # the second picture of an MPO, as of phones, is a preview or a depth map
    has_more = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    image.load()  # first: of a TIFF this turns the pixels and removes the orientation
    turn = _turn(image)
    upright = image if turn is None else image.transpose(turn)
    layer = upright.convert("RGBA") if image.has_transparency_data else None
    if layer is None or layer.getchannel("A").getextrema()[0] == 255:  # opaque all over
        return Picture(upright.convert("RGB"), turn is not None, False, has_more)
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Picture(Image.alpha_composite(white, layer).convert("RGB"), turn is not None, True, has_more)


def _turn(file: Any) -> Any:
    """The transposition that its EXIF orientation asks for, or None; EXIF data that cannot be read ask for none."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(file.getexif().get(0x0112))
    except Exception:  # PIL raises many types; viewers show such an image as it is
        return None


def fitted(resize: Any, crop: Any) -> Callable[[Any], Tensor]:
    """From a PIL image to its pixels (channels, H, W) uint8: the shorter side resized, then the centre cropped."""
    v2 = import_torchvision().transforms.v2
    transform: Callable[[Any], Tensor] = v2.Compose([v2.Resize(resize), v2.CenterCrop(crop), v2.PILToTensor()])
    return transform


def decode(folder: Path, names: Sequence[str], image_size: int, on_image: OnImage = lambda *_: None) -> Decoded:
    """Each image with its shorter side resized to ``image_size`` and its centre cropped; all broken files are named at once."""
    transform = fitted(image_size, image_size)
    images = torch.zeros((len(names), 3, image_size, image_size), dtype=torch.uint8)
    digests, turned, transparent, cut, broken = [], 0, 0, 0, []
    for i, name in enumerate(names):
        try:
            picture = read_image(folder / name)
        except LabError as error:
            broken.append(str(error).removeprefix("cannot read the image ").removesuffix("; mend or remove it"))
        else:
            images[i].copy_(transform(picture.image))
            pixels = f"{picture.image.size}".encode() + picture.image.tobytes()
            digests.append(hashlib.blake2b(pixels, digest_size=16).digest())
            turned, transparent = turned + picture.turned, transparent + picture.was_transparent
            cut += picture.has_more
        on_image(i + 1, len(names))
    if broken:
        raise broken_files(broken, len(names))
    return Decoded(images, digests, turned, transparent, cut)


def broken_files(reasons: Sequence[str], num_files: int) -> LabError:
    """One error for all files that cannot be read."""
    if len(reasons) == 1:
        return LabError(f"cannot read the image {reasons[0]}; mend or remove it")
    rest = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    return LabError(f"cannot read {len(reasons)} of {num_files} images: {'; '.join(reasons[:NAMED])}{rest}; mend or remove them")
