"""One recipe being trained by one process, alone or among several."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.samples import Samples
from ..files import write_text
from ..models import build, check_input
from ..predictions import Predictions
from ..stopping import Stopped, Told
from . import checkpoint
from .cuda_graph import CudaGraph
from .environment import environment
from .evaluate import Evaluation, evaluate
from .feeds import Feed, samples_of_an_epoch
from .machine import Processes
from .method import Method, Step
from .optimizer import Optimizer
from .progress import Progress, averaged, metrics_csv
from .recipe import Recipe
from .seeds import seeded
from .step import GraphedStep, TakesSteps, eager_step
from .streams import feed_of

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_SECONDS = 30.0  # an interrupted run loses at most this much


class Run:
    """Data, method, optimiser and progress; all of it as it was where the run was interrupted."""

    def __init__(
        self,
        recipe: Recipe,
        data: Samples,
        folder: Path,
        accelerator: "Accelerator",
        told: Told,
        *,
        graph: bool = True,
        on_message: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.recipe, self.folder, self.told = recipe, folder, told
        self.processes = processes = Processes(recipe, accelerator)
        self.device, self.main = processes.device, processes.main
        self.feed: Feed = feed_of(recipe, data, self.device, processes.rank, processes.world)
        check_input(recipe.network, self.feed.image_size)
        self.num_samples = samples_of_an_epoch(recipe, len(self.feed.rows.training))
        num_steps = recipe.epochs * -(-self.num_samples // recipe.batch_size)
        torch.manual_seed(seeded(recipe.seed, "weights").initial_seed())
        network = build(recipe, self.feed.in_channels, len(self.feed.classes))
        counts = torch.bincount(self.feed.rows.training_labels, minlength=len(self.feed.classes))
        self.method = Method(recipe, network, num_steps, counts).to(self.device)
        if recipe.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Optimizer(recipe, network, self.device)
        self.wrapped = processes.wrap(self.method)
        self.step: TakesSteps = self._step(graph, on_message)
        self.counted: list[tuple[Tensor, int]] = []  # of batches since the last gathering: counts() on the device, the size of the batch
        self.measured: tuple[Tensor, Tensor] | None = None  # logits and targets of the last evaluation
        self.progress = self._resumed()
        self.started = time.monotonic() - self.progress.seconds
        self.saved = time.monotonic()

    def _step(self, graph: bool, on_message: Callable[[str], object]) -> TakesSteps:
        step = eager_step(self.recipe, self.method, self.wrapped, self.optimizer, self.processes.rank, self.processes.world, on_message)
        if not graph or self.device.type != "cuda":
            return step
        if self.processes.world > 1:
            on_message("training steps run eagerly, which is slower than a CUDA graph: several processes share a batch")
            return step
        return GraphedStep(step, self.recipe.batch_size, CudaGraph(self.device), on_message)

    def _resumed(self) -> Progress:
        state = checkpoint.load(self.folder, self.recipe, self.device)
        if state is None:
            return Progress()
        self.method.load_state_dict(state["method"])
        self.optimizer.load(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        return Progress(**state["progress"])

    def save(self) -> None:
        """Write a checkpoint."""
        self._gather()
        self.saved = time.monotonic()
        self.progress.seconds = self.saved - self.started
        if self.main:
            state = {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": vars(self.progress)}
            checkpoint.save(self.folder, self.recipe, state | {"random": torch.get_rng_state()})

    def save_if_due(self) -> None:
        """Write a checkpoint when one is due; leave where the run was told to stop."""
        told, due = self.processes.any(self.told.is_set(), time.monotonic() - self.saved > CHECKPOINT_SECONDS)
        if told or due:
            self.save()
        if told:
            raise Stopped(self.told.number)

    def train_epoch(self) -> None:
        """What is left of an epoch's training."""
        progress, processes = self.progress, self.processes
        self.optimizer.set_rate(progress.epoch)
        self.wrapped.train()
        began = time.monotonic() - progress.training_seconds
        for batch in self.feed.training(progress.epoch, progress.step):
            seed = seeded(self.recipe.seed, "layers", progress.epoch, progress.step, processes.rank).initial_seed()
            self.counted.append((self.step(batch, seed), batch.size))
            progress.step += 1
            if processes.world == 1 or progress.step % 10 == 0:
                progress.training_seconds = time.monotonic() - began
                self.save_if_due()
        self._gather()
        progress.training_seconds = time.monotonic() - began

    def _gather(self) -> None:
        """Bring what was counted on the devices of all processes into the progress."""
        if self.counted:
            counts, sizes = zip(*self.counted, strict=True)
            self.progress.count(self.processes.sum(torch.stack(counts)).tolist(), list(sizes))
            self.counted = []

    @torch.no_grad()
    def evaluate(self) -> tuple[Evaluation, float]:
        """What is measured on the held-out split, and the method's own loss there."""
        processes = self.processes
        self.method.eval()
        self.measured = None  # two would be in memory
        processes.copy_buffers(self.method)
        logits, targets, losses, sizes = [], [], [], []
        for images, target in self.feed.held_out():
            step: Step = self.method(images, target)
            logits.append(step.plain)
            targets.append(target)
            losses.append(step.loss)  # read when all are computed: nothing waits for the device
            sizes.append(len(target))
            if processes.world == 1:
                self.save_if_due()
        count = self.feed.num_held_out
        whole, target = processes.all_rows(logits, (len(self.feed.classes),), count), processes.all_rows(targets, (), count)
        own = torch.zeros(1, dtype=torch.float64)
        for loss, size in zip(torch.stack(losses).tolist() if losses else [], sizes, strict=True):
            own += loss * size
        self.measured = whole, target
        return evaluate(whole, target), processes.sum(own).item() / count

    def finish_epoch(self) -> Evaluation | None:
        """Measure the epoch that was trained, where it is due, and go on to the next."""
        progress, done = self.progress, self.progress.epoch + 1
        due = done == self.recipe.epochs or done % self.recipe.evaluate_every == 0
        measured = self.evaluate() if due else None
        rate = self.optimizer.rates[progress.epoch]
        progress.finish_epoch(self.num_samples, rate, self.method.asymmetry(), self.feed.split, measured)
        if self.main:
            write_text(self.folder / "metrics.csv", metrics_csv(progress.rows))
        return measured[0] if measured else None

    def predictions(self, files: Sequence[str]) -> Predictions:
        """Those of the last evaluation; ``files`` are the names of its samples, none where they are their indices."""
        assert self.measured is not None
        logits, target = (values.cpu().numpy() for values in self.measured)
        return Predictions(logits, target, np.array(files) if files else np.arange(len(target)))

    def record(self, measured: Evaluation) -> dict[str, Any]:
        """What ``result.json`` holds."""
        progress = self.progress
        of_split = {"test": None, "validation": None, self.feed.split: dataclasses.asdict(measured)}
        return {
            "recipe": self.recipe.to_dict(),
            "classes": list(self.feed.classes),
            "num_train": len(self.feed.rows.training),
            "num_test": self.feed.num_held_out,
            "environment": environment(self.recipe),
            "seconds": time.monotonic() - self.started,
            "images_per_second": self.num_samples * self.recipe.epochs / progress.training_seconds,
            **of_split,
            "epochs": progress.rows,
            "rho_of_batches": averaged(progress.rho_of_batches),
        }
