"""What the ranks of the tests of metrics do: each function runs in a process of its own, on every rank of ``group``."""

import torch
import torch.distributed as dist
from torch import Tensor

from largemargin.metrics import MarginMetrics


def rows_of(rank: int) -> tuple[Tensor, Tensor]:
    """Uneven shares, and no row at all on rank 1."""
    rng = torch.Generator().manual_seed(rank)
    rows = 0 if rank == 1 else 5 * (rank + 1)
    return 3 * torch.randn(rows, 7, generator=rng, dtype=torch.float64), torch.randint(7, (rows,), generator=rng)


def reduced(group: dist.ProcessGroup) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of all ranks together, and those that this rank still has of its own."""
    metrics = MarginMetrics(num_bins=10, top_k=2)
    metrics.update(*rows_of(dist.get_rank(group)))
    return metrics.reduce(group).compute(), metrics.compute()
