"""The seeds of a comparison: those given, or as many as the verdicts need."""

from numbers import Integral
from typing import Any

from ..comparison.design import FIRST_LOOK, MAX_SEEDS
from ..comparison.plan import AUTO
from ..errors import LabError

SEEDS = 2**32  # as many as numpy takes


def seeds_of(seeds: list[Any], max_seeds: int | None) -> dict[str, Any]:
    """The seeds of a comparison, from ``--seeds`` and ``--max-seeds``."""
    if AUTO not in seeds:
        if max_seeds is not None:
            raise LabError(f"--max-seeds {max_seeds} is for --seeds auto; leave it out, or give --seeds auto")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < SEEDS:
                raise LabError(f"--seeds must be whole numbers from 0 to {SEEDS - 1:,}, or auto, got {seed}")
        return {"seeds": tuple(dict.fromkeys(map(int, seeds)))}
    if len(seeds) > 1:
        raise LabError(f"--seeds auto stands alone, got {' '.join(map(str, seeds))}")
    most = MAX_SEEDS if max_seeds is None else max_seeds
    if most < FIRST_LOOK:
        raise LabError(f"--max-seeds must be at least {FIRST_LOOK}, the pairs of the first look, got {most}")
    return {"seeds": tuple(range(FIRST_LOOK)), "max_seeds": most}
