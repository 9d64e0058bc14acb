"""A data set of any kind, and what its samples are called."""

from .features import FeatureSet
from .folders import FileSet
from .images import ImageSet

Samples = ImageSet | FileSet | FeatureSet


def noun_of(samples: Samples) -> str:
    return "sample" if isinstance(samples, FeatureSet) else "image"
