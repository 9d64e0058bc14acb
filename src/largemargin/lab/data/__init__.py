"""The data sets, each an entry of :data:`SETS`. Nothing heavy is imported until one is read."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LabError

if TYPE_CHECKING:
    from .samples import Samples


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is read."""

    read: str  # "file:function" of this room, called with the name of the set and the data root
    training: int  # images
    test: int
    classes: int
    pixels: int
    folder: str = ""  # under the data root, as published; none: a package ships it
    suited: Mapping[str, Any] = field(default_factory=dict)  # the fields of a recipe for which its usual values are not the defaults
    archived: bool = False  # published as archives, which `largemargin data fetch` gets
    streamed: bool = False  # too large for memory: its owners give it out under their terms, and its images stay in their files


CIFAR = {"epochs": 50, "crop_padding": 4, "flip": True}  # Sec. 4.1
LARGE = {"epochs": 120, "batch_size": 256, "schedule": "steps", "milestones": (30, 60, 90), "augmentation": "inception", "image_size": 224}
SETS = {
    "digits": DataSet("images:digits", 1_198, 599, 10, 8),
    "cifar10": DataSet("archives:archived", 50_000, 10_000, 10, 32, "cifar-10-batches-py", CIFAR, archived=True),
    "cifar100": DataSet("archives:archived", 50_000, 10_000, 100, 32, "cifar-100-python", CIFAR, archived=True),
    # not mirrored: a mirrored digit is another
    "svhn": DataSet("archives:archived", 73_257, 26_032, 10, 32, "svhn", {"epochs": 50}, archived=True),
    "imagenet": DataSet("folders:streamed_set", 1_281_167, 50_000, 1000, 224, "imagenet", LARGE, streamed=True),
    "places365": DataSet("folders:streamed_set", 1_803_460, 36_500, 365, 224, "places365", LARGE, streamed=True),
}
ARCHIVED = tuple(name for name, known in SETS.items() if known.archived)
STREAMED = tuple(name for name, known in SETS.items() if known.streamed)


def load(
    data: str,
    data_root: str,
    image_size: int,
    streamed: bool = False,
    on_image: Callable[[int, int], object] = lambda *_: None,
    *,
    labels: str = "",
    unverified: bool = False,
    target: str = "",
) -> "Samples":
    """The data set called ``data``: one of :data:`SETS`, an npz file, a table, or an image folder, which ``streamed`` leaves in its files.

    ``on_image`` hears how many images of how many are decoded. ``labels`` is a file with other training labels for a folder;
    ``unverified`` takes files of SVHN whose md5 is not the published one. ``target`` is the column of the classes in a table.
    """
    is_folder = data not in SETS and not is_data_file(data)
    if labels and not is_folder:
        raise LabError(f"--labels {labels} is for the images of a folder, and --data is {data}; leave it out")
    if unverified and data not in ARCHIVED:
        raise LabError(f"--unverified is for svhn, whose files have a published md5, and --data is {data}; leave it out")
    if target and not is_table(data):
        raise LabError(f"--target {target} is for a table (.csv or .parquet), and --data is {data}; leave it out")
    found: Samples
    if data in SETS:
        found = _reader(SETS[data].read)(data, Path(data_root).expanduser(), **({"unverified": True} if unverified else {}))
    elif is_table(data):
        found = _reader("features:feature_table")(Path(data).expanduser(), target)
    elif not is_folder:
        found = _reader("arrays:array_set")(Path(data).expanduser())
    elif streamed:
        found = _reader("folders:streamed_folder")(Path(data).expanduser(), labels)
    else:
        found = _reader("folders:image_folder")(Path(data).expanduser(), image_size, on_image, labels)
    return found


class Wanted(Protocol):
    """What is read of a recipe."""

    @property
    def data(self) -> str: ...
    @property
    def data_root(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def labels(self) -> str | None: ...
    @property
    def unverified(self) -> bool | None: ...
    @property
    def target(self) -> str | None: ...


def load_of(recipe: Wanted, on_image: Callable[[int, int], object] = lambda *_: None) -> "Samples":
    """The data of a recipe."""
    return load(
        recipe.data,
        recipe.data_root,
        recipe.image_size,
        recipe.streamed,
        on_image,
        labels=recipe.labels or "",
        unverified=bool(recipe.unverified),
        target=recipe.target or "",
    )


def is_data_file(data: str) -> bool:
    """Whether it names a file of arrays or a table, which is read as it is."""
    return data.lower().endswith(".npz") or is_table(data)


def is_table(data: str) -> bool:
    return data.lower().endswith((".csv", ".parquet"))


def holds_features(data: str) -> bool:
    """Whether the samples are features and no images; a file that cannot be read holds none."""
    if is_table(data):
        return True
    return data.lower().endswith(".npz") and bool(_reader("arrays:dimensions")(Path(data).expanduser()) == 2)


def _reader(name: str) -> Any:
    file, _, function = name.partition(":")
    return getattr(importlib.import_module(f".{file}", __package__), function)


def suited_to(data: str, image_size: int | None = None) -> dict[str, Any]:
    """The fields of a recipe in which a data set asks for other than the defaults; ``image_size`` is of images in files."""
    if data in SETS:
        return dict(SETS[data].suited) | ({"image_size": image_size} if SETS[data].streamed and image_size else {})
    if is_data_file(data):  # whether its images may be moved or mirrored is not known
        return {"epochs": 50}
    pixels = image_size or 32
    return {"epochs": 50, "image_size": pixels, "crop_padding": pixels // 8, "flip": True}


def check_image_size(data: str, image_size: int | None) -> None:
    """Raises LabError for one that would change nothing."""
    if image_size is not None and is_table(data):
        raise LabError(f"image_size {image_size} does not apply to {data}: it holds no images; leave it out")
    if (is_data_file(data) or (data in SETS and not SETS[data].streamed)) and image_size is not None:
        raise LabError(f"image_size {image_size} does not apply to {data}: its images are used as they are; leave it out")
