"""One optimiser step and what is counted of it. On a GPU a step is replayed as one CUDA graph, so that the host is not the limit.

A step reads nothing back from the device and copies nothing to it: only then can it be captured, and only then does the host run ahead.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import row_stats
from .cuda_graph import CudaGraph
from .feeds import Batch, own_rows
from .method import Method, Step
from .recipe import Recipe

WARM_UP = 3  # steps before the capture: they compile kernels, choose convolutions and make the optimiser's state


class TakesSteps(Protocol):
    """Does one step on a batch, with the random numbers of ``seed``, and returns what :func:`counts` does."""

    def __call__(self, batch: Batch, seed: int) -> Tensor: ...


@torch.no_grad()
def counts(step: Step, target: Tensor, batch: Batch) -> Tensor:
    """Sums over this process's rows of loss, errors, rho-hat and margin, and its part of the share of logits that have a gradient: (5,)."""
    mine = len(batch.target)
    stats = row_stats(step.plain, target)
    errors = (step.plain.argmax(-1) != target) | step.plain.isnan().any(-1)
    sums = torch.stack([step.loss.detach() * mine, errors.sum(), stats.rho.sum(), (stats.log_odds + stats.rho).sum()]).double()
    gradient = step.logits.grad
    assert gradient is not None
    share = (gradient != 0).double().mean() * (mine / batch.size)
    return torch.cat([sums, share.unsqueeze(0)]) if mine else sums.new_zeros(5)


class EagerStep:
    """Forward, backward and optimiser, one operation after the other."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None, world: int = 1) -> None:
        self.model, self.optimizer, self.clip_norm, self.world = model, optimizer, clip_norm, world

    def __call__(self, batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)  # for dropout, say
        return self.run(batch)

    def run(self, batch: Batch) -> Tensor:
        """The step without its seed: all that a graph can hold."""
        images, target, mine = batch.images, batch.target, len(batch.target)
        if not mine:  # the last batch had no row for this process, which takes part with one that counts 0
            images, target = images.new_zeros(1, *images.shape[1:]), target.new_zeros(1)
        step: Step = self.model(images, target, mine)
        step.logits.retain_grad()
        # processes average their gradients: each counts as much as it has rows
        share = mine * self.world / batch.size
        self.optimizer.zero_grad()
        torch.autograd.backward(step.loss if share == 1 else share * step.loss)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return counts(step, target, batch)


class CompiledStep(EagerStep):
    """A step with compiled features for batches of ``num_rows``. If the first of these fails, ``give_up`` undoes the compilation."""

    def __init__(self, *of_a_step: Any, num_rows: int, give_up: Callable[[RuntimeError], object]) -> None:
        super().__init__(*of_a_step)
        self.num_rows, self.give_up, self.tried = num_rows, give_up, False

    def __call__(self, batch: Batch, seed: int) -> Tensor:
        if self.tried or len(batch.target) != self.num_rows:
            return super().__call__(batch, seed)
        self.tried = True
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            return super().__call__(batch, seed)
        except RuntimeError as error:  # if it was not the compiler's, the same step raises it again
            self.give_up(error)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():  # the forward pass may have moved the statistics of batch norm
                buffer.copy_(before[name])
        return super().__call__(batch, seed)


def eager_step(
    recipe: Recipe,
    method: Method,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    world: int,
    on_message: Callable[[str], object],
) -> EagerStep:
    """The step of a recipe in process ``rank`` of ``world``, its features compiled where the recipe says so."""
    arguments = (wrapped, optimizer, recipe.clip_norm, world)
    if not recipe.compile:
        return EagerStep(*arguments)
    num_rows = len(range(recipe.batch_size)[own_rows(rank, world)])
    method.compile_features(recipe.compile, num_rows)

    def give_up(error: RuntimeError) -> None:
        method.compiled = None
        reason = first_line(error.__context__ or error)  # dynamo raises its own errors from the compiler's
        on_message(f"the network runs without torch.compile: {recipe.compile} failed ({reason})")

    return CompiledStep(*arguments, num_rows=num_rows, give_up=give_up)


class GraphedStep:
    """The same step, replayed from a graph. The first batches of a process, and those of another size, are done eagerly.

    The first batches are the warm-up, so a warm-up leaves no trace. The seed is set before each replay, so that replayed and eager steps
    draw the same numbers. If a step cannot be recorded, all steps are eager, and ``on_message`` is called with the reason.
    """

    def __init__(self, step: EagerStep, batch_size: int, graph: CudaGraph, on_message: Callable[[str], object]) -> None:
        self.step, self.batch_size, self.on_message = step, batch_size, on_message
        self.graph: CudaGraph | None = graph  # None: all steps are eager
        self.warm_ups = 0
        self.static: Batch | None = None  # what the recorded step reads

    def __call__(self, batch: Batch, seed: int) -> Tensor:
        if self.graph is None or len(batch.target) != self.batch_size:
            return self.step(batch, seed)
        if self.warm_ups < WARM_UP:
            return self._warm_up(self.graph, batch, seed)
        if self.static is None and not self._record(self.graph, batch):
            return self.step(batch, seed)
        assert self.static is not None
        self.static.images.copy_(batch.images)
        self.static.target.copy_(batch.target)
        self.graph.seed(seed)
        self.graph.replay()
        return self.counted.clone()

    def _warm_up(self, graph: CudaGraph, batch: Batch, seed: int) -> Tensor:
        before = dict(self.step.model.named_buffers())
        counted = graph.warm_up(lambda: self.step(batch, seed))
        self.warm_ups += 1
        if replaced := replaced_buffers(before, self.step.model):
            self._give_up(f"the loss replaces its state ({', '.join(replaced)}) instead of writing into it")
        return counted

    def _record(self, graph: CudaGraph, batch: Batch) -> bool:
        """Whether a step could be recorded."""
        static = Batch(batch.images.clone(), batch.target.clone(), batch.size)
        try:
            self.counted = graph.record(lambda: self.step.run(static))
        except RuntimeError as error:
            self._give_up(f"the capture failed ({first_line(error)})")
            return False
        self.static = static
        return True

    def _give_up(self, reason: str) -> None:
        self.graph = None
        self.on_message(f"training steps run eagerly, which is slower than a CUDA graph: {reason}")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def replaced_buffers(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    """The names of buffers that are other tensors than ``before``: a graph would go on reading the old ones."""
    return [name for name, buffer in model.named_buffers() if before.get(name) is not buffer]
