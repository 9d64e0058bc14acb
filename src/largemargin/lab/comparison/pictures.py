"""Small pictures of test images, as data URIs for a page that needs nothing from outside."""

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import data
from ..data.decode import read_image
from ..data.images import ImageSet
from ..errors import LabError
from ..predictions import Predictions
from .plan import Comparison

SIDE = 96  # pixels


class Pictures:
    """The held-out images of a comparison; a data set in memory is read once, when the first picture is asked for."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    @functools.cached_property
    def _in_memory(self) -> ImageSet:
        images = data.load_of(self.comparison.example)
        if not isinstance(images, ImageSet) or images.digest() != self.comparison.data_digest:
            raise LabError(f"data {self.comparison.data} are not those of the runs any more")
        return images

    def thumbnails(self, predictions: Predictions, indices: Sequence[int]) -> list[str]:
        """The images of these samples as data URIs; raises LabError if they are not where they were."""
        ids, comparison = [predictions.ids[i] for i in indices], self.comparison
        if ids and isinstance(ids[0], np.str_):
            inside = Path(comparison.data) if comparison.is_folder else Path(comparison.data_root) / comparison.data
            return [_uri(read_image(inside.expanduser() / str(name)).image) for name in ids]
        return [_uri(_image_of(self._in_memory.test_images[int(i)].numpy())) for i in ids]


def _image_of(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _uri(image: Any) -> str:
    from PIL.Image import Resampling

    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    small = image.resize(size, Resampling.LANCZOS if scale < 1 else Resampling.NEAREST)
    file = io.BytesIO()
    small.save(file, "PNG" if small.mode == "L" or scale > 1 else "JPEG", quality=85)
    kind = "png" if file.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
