"""A function's work on a GPU, recorded once and replayed: one launch in place of hundreds."""

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class CudaGraph:
    """What one function gives a GPU to do."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        index = torch.device(device).index
        self.index = torch.cuda.current_device() if index is None else index
        self.stream = recording_stream(self.index)
        self.graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Call it on the stream of the recording, as torch's notes on CUDA graphs ask."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Result]) -> Result:
        """Record a call, with which the GPU does nothing yet; its result is overwritten by each replay."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self.stream):
            # thread_local: the thread that pins batches of image files may go on meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                self._abandon(graph, pool)
                raise
            graph.capture_end()
        self.graph = graph
        return result

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """End a recording that failed. Where CUDA has ended it already, torch leaves its allocator and its generator recording."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
            return
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.index, pool)
        generator = torch.cuda.default_generators[self.index]
        generator.graphsafe_set_state(generator.clone_state())

    def seed(self, seed: int) -> None:
        """Set the numbers that the next replay draws: a graph holds torch's generator, not what it drew when it was recorded."""
        torch.cuda.default_generators[self.index].manual_seed(seed)

    def replay(self) -> None:
        """Have the GPU do the recorded work again."""
        assert self.graph is not None, "nothing was recorded"
        self.graph.replay()


@functools.cache
def recording_stream(index: int) -> torch.cuda.Stream:
    """One for all recordings of a process: each stream that ever multiplied keeps a workspace."""
    return torch.cuda.Stream(index)
