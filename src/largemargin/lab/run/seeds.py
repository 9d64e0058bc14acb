"""Random numbers as a function of what they are for: a resumed run draws what an unbroken one would."""

import numpy as np
import torch


def seeded(seed: int, purpose: str, *place: int) -> torch.Generator:
    """An independent stream of random numbers for each purpose and place: an epoch, a step, a process."""
    words = np.random.SeedSequence([seed, *(place or (0,)), *purpose.encode()]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
