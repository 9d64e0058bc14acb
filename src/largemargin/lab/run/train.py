"""The training loop: one recipe, one run."""

import csv
import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.folders import FileSet
from ..data.images import ImageSet
from ..errors import LabError
from ..files import remove_unfinished, write_json, write_text
from ..models import build, check_image
from ..predictions import NAME as PREDICTIONS
from ..predictions import Predictions
from ..stopping import Stopped, Told, interrupts_end_at_once, told_to_stop
from ..words import counted
from . import checkpoint, model
from .cuda_graph import CudaGraph
from .environment import check_device, environment
from .evaluate import Evaluation, evaluate
from .feeds import Feed, own_rows, samples_of_an_epoch
from .method import Method, Step, parameter_groups
from .recipe import Recipe
from .rows import save_rows
from .seeds import seeded
from .step import CompiledStep, EagerStep, GraphedStep, TakesSteps, first_line
from .streams import feed_of

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_SECONDS = 30.0  # an interrupted run loses at most this much
CURVE_POINTS = 300  # the curve over training batches is averaged down to this many points


def learning_rates(recipe: Recipe) -> list[float]:
    """One for each epoch."""
    epochs, last = np.arange(recipe.epochs), max(recipe.epochs - 1, 1)
    match recipe.schedule:
        case "log":
            factors: np.ndarray[Any, Any] = np.logspace(0, np.log10(recipe.final_factor), recipe.epochs)
        case "cosine":
            factors = recipe.final_factor + (1 - recipe.final_factor) * (1 + np.cos(np.pi * epochs / last)) / 2
        case "steps":
            factors = recipe.step_factor ** np.searchsorted(np.sort(recipe.milestones), epochs, side="right")
        case _:
            raise LabError(f"schedule must be log, cosine or steps, got {recipe.schedule!r}")
    return [float(rate) for rate in recipe.learning_rate * factors]


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds beside weights and optimiser."""

    epoch: int = 0
    step: int = 0  # of this epoch, done
    totals: list[float] = field(default_factory=lambda: [0.0] * 4)  # the epoch's sums of loss, errors, rho-hat and margin over samples
    gradient_share: float = 0.0  # at the first step of this epoch
    rho_of_batches: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the epochs done
    training_seconds: float = 0.0
    seconds: float = 0.0


class Run:
    """One recipe being trained by one process, alone or among several."""

    def __init__(
        self,
        recipe: Recipe,
        data: ImageSet | FileSet,
        folder: Path,
        accelerator: "Accelerator",
        told: Told,
        *,
        graph: bool = True,
        on_message: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.recipe, self.folder, self.accelerator, self.told = recipe, folder, accelerator, told
        self.rank, self.world, self.main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
        # the accelerator's own is cpu:0 among several processes, where no checkpoint can be loaded to
        self.device = accelerator.device if self.world > 1 and recipe.device != "cpu" else torch.device(recipe.device)
        self.feed: Feed = feed_of(recipe, data, self.device, self.rank, self.world)
        check_image(recipe.network, self.feed.image_size)
        self.num_train = len(self.feed.rows.training)
        self.num_samples = samples_of_an_epoch(recipe, self.num_train)
        self.num_steps = -(-self.num_samples // recipe.batch_size)
        torch.manual_seed(seeded(recipe.seed, "weights").initial_seed())
        network = build(recipe, self.feed.in_channels, len(self.feed.classes))
        self.method = Method(recipe, network, recipe.epochs * self.num_steps).to(self.device)
        if recipe.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # a graph reads the learning rate from the device, and of SGD only the fused form takes it from there without waiting
        self.fused = True if self.device.type == "cuda" else None
        groups = parameter_groups(recipe, network)
        self.optimizer = torch.optim.SGD(
            groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=self.fused
        )
        self.wrapped = accelerator.prepare_model(self.method, device_placement=False) if self.world > 1 else self.method
        step = self._eager_step(on_message)
        graphed = graph and self.device.type == "cuda" and self.world == 1
        self.step: TakesSteps = GraphedStep(step, recipe.batch_size, CudaGraph(self.device), on_message) if graphed else step
        if graph and self.device.type == "cuda" and not graphed:
            on_message("training steps run eagerly, which is slower than a CUDA graph: several processes share a batch")
        self.rates = learning_rates(recipe)
        self.counted: list[
            tuple[Tensor, int]
        ] = []  # of batches since the last gathering: counts() on the device, and the size of the batch
        self.measured: tuple[Tensor, Tensor] | None = None  # logits and targets of the last evaluation
        self.progress = self._resumed()
        self.started = time.monotonic() - self.progress.seconds
        self.saved = time.monotonic()

    def _eager_step(self, on_message: Callable[[str], object]) -> EagerStep:
        arguments = (self.wrapped, self.optimizer, self.recipe.clip_norm, self.world)
        if not self.recipe.compile:
            return EagerStep(*arguments)
        num_rows = len(range(self.recipe.batch_size)[own_rows(self.rank, self.world)])
        self.method.compile_features(self.recipe.compile, num_rows)

        def give_up(error: RuntimeError) -> None:
            self.method.compiled = None
            reason = first_line(error.__context__ or error)  # dynamo raises its own errors from the compiler's
            on_message(f"the network runs without torch.compile: {self.recipe.compile} failed ({reason})")

        return CompiledStep(*arguments, num_rows=num_rows, give_up=give_up)

    def _resumed(self) -> Progress:
        state = checkpoint.load(self.folder, self.recipe, self.device)
        if state is None:
            return Progress()
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # that of an earlier version may have been written without
            group["fused"] = self.fused
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
        told, due = self.told.is_set(), time.monotonic() - self.saved > CHECKPOINT_SECONDS
        if self.world > 1:  # all processes do the same: a signal may reach one of them, and clocks differ
            told, due = (bool(flag) for flag in self._sum(torch.tensor([told, due], dtype=torch.float64)).tolist())
        if told or due:
            self.save()
        if told:
            raise Stopped(self.told.number)

    def _set_learning_rate(self) -> None:
        """That of the epoch, as a number, or where the optimiser is fused as a tensor that stays the same."""
        for group in self.optimizer.param_groups:
            rate = self.rates[self.progress.epoch] * group["factor"]
            if not self.fused:
                group["lr"] = rate
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = torch.tensor(rate, dtype=torch.float32, device=self.device)

    def train_epoch(self) -> None:
        """What is left of an epoch's training."""
        recipe, progress = self.recipe, self.progress
        self._set_learning_rate()
        self.wrapped.train()
        began = time.monotonic() - progress.training_seconds
        for batch in self.feed.training(progress.epoch, progress.step):
            seed = seeded(recipe.seed, "layers", progress.epoch, progress.step, self.rank).initial_seed()
            self.counted.append((self.step(batch, seed), batch.size))
            progress.step += 1
            if self.world == 1 or progress.step % 10 == 0:
                progress.training_seconds = time.monotonic() - began
                self.save_if_due()
        self._gather()
        progress.training_seconds = time.monotonic() - began

    def _gather(self) -> None:
        """Bring what was counted on the devices of all processes into the progress, batch by batch: the same sums wherever it was cut."""
        if not self.counted:
            return
        counted = self._sum(torch.stack([counts for counts, _ in self.counted])).tolist()
        if self.progress.step == len(counted):  # the first of them is the first of the epoch
            self.progress.gradient_share = counted[0][4]
        for (*sums, _), (_, size) in zip(counted, self.counted, strict=True):
            self.progress.totals = [total + value for total, value in zip(self.progress.totals, sums, strict=True)]
            self.progress.rho_of_batches.append(sums[2] / size)
        self.counted = []

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over processes, on the CPU."""
        return self.accelerator.reduce(values.to(self.device), "sum").cpu() if self.world > 1 else values.cpu()

    @torch.no_grad()
    def evaluate(self) -> tuple[Evaluation, float]:
        """What is measured on the held-out split, and the method's own loss there."""
        self.method.eval()
        self.measured = None  # two would be in memory
        if self.world > 1:  # what batch norm has seen differs: the first process has it as checkpoints do
            for buffer in self.method.buffers():
                torch.distributed.broadcast(buffer, 0)
        logits, targets, losses, sizes = [], [], [], []
        for images, target in self.feed.held_out():
            step: Step = self.method(images, target)
            logits.append(step.plain)
            targets.append(target)
            losses.append(step.loss)  # read when all are computed: nothing waits for the device
            sizes.append(len(target))
            if self.world == 1:
                self.save_if_due()
        whole, target = self._all_of(logits, (len(self.feed.classes),)), self._all_of(targets, ())
        own = torch.zeros(1, dtype=torch.float64)
        for loss, size in zip(torch.stack(losses).tolist() if losses else [], sizes, strict=True):
            own += loss * size
        self.measured = whole, target
        return evaluate(whole, target), self._sum(own).item() / self.feed.num_held_out

    def _all_of(self, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The rows of all processes, in order: only the last shares may be short."""
        mine = torch.cat(parts) if parts else torch.empty(0, *shape, device=self.device, dtype=torch.float32 if shape else torch.int64)
        if self.world == 1:
            return mine
        padded = self.accelerator.pad_across_processes(mine)
        gathered: Tensor = self.accelerator.gather(padded)
        return gathered[: self.feed.num_held_out]

    def finish_epoch(self) -> Evaluation | None:
        """Measure the epoch that was trained, and go on to the next."""
        progress, split = self.progress, self.feed.split
        last = progress.epoch + 1 == self.recipe.epochs
        measured: Evaluation | None = None
        of_split: dict[str, float | None] = dict.fromkeys(("error", "nll", "loss", "rho", "margin"))
        if last or (progress.epoch + 1) % self.recipe.evaluate_every == 0:
            measured, own = self.evaluate()
            of_split = {"error": measured.error, "nll": measured.nll, "loss": own, "rho": measured.rho, "margin": measured.margin}
        loss, errors, rho, margin = (total / self.num_samples for total in progress.totals)
        row = {
            "epoch": progress.epoch + 1,
            "learning_rate": self.rates[progress.epoch],
            "train_loss": loss,
            "train_error": 100 * errors,
            "train_rho": rho,
            "train_margin": margin,
            "gradient_share": progress.gradient_share,
            "asymmetry": self.method.asymmetry(),
            **{f"{split}_{name}": value for name, value in of_split.items()},
        }
        progress.rows.append(row)
        progress.epoch, progress.step, progress.totals, progress.gradient_share = progress.epoch + 1, 0, [0.0] * 4, 0.0
        if self.main:
            write_text(self.folder / "metrics.csv", metrics_csv(progress.rows))
        return measured

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
            "num_train": self.num_train,
            "num_test": self.feed.num_held_out,
            "environment": environment(self.recipe),
            "seconds": time.monotonic() - self.started,
            "images_per_second": self.num_samples * self.recipe.epochs / progress.training_seconds,
            **of_split,
            "epochs": progress.rows,
            "rho_of_batches": averaged(progress.rho_of_batches),
        }


def train(
    recipe: Recipe,
    data: ImageSet | FileSet,
    folder: Path,
    on_epoch: Callable[[dict[str, Any]], object] = lambda _: None,
    on_end: Callable[[nn.Module, Feed], object] = lambda *_: None,
    *,
    tensorboard: bool = False,
    save: bool = False,
    keep_checkpoint: bool = False,
    graph: bool = True,
    on_message: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Train by the recipe and write ``result.json`` into ``folder``; goes on from a checkpoint found there.

    ``on_epoch`` is called with each epoch's measurements, ``on_end`` with the network in eval mode and its data, ``on_message`` with a line
    for the user if a CUDA graph or compiled code cannot be used. SIGTERM ends the run after a checkpoint, by SystemExit. With ``save`` the
    run leaves its model and its predictions for the test set, if it measures itself there, with ``keep_checkpoint`` the last state of the
    whole run. On a GPU the steps are replayed as a CUDA graph; without ``graph`` they run eagerly. Returns what is in ``result.json``.
    """
    accelerator = start(recipe)
    with told_to_stop() as told:
        run = Run(recipe, data, folder, accelerator, told, graph=graph, on_message=on_message)
        if run.main:
            remove_unfinished(folder)
            write_json(folder / "recipe.json", recipe.to_dict())
            save_rows(run.feed.rows, folder / "training_set.npz")
        log = tracker(folder, run.progress.epoch) if tensorboard and run.main else None
        measured = None
        while run.progress.epoch < recipe.epochs:
            run.train_epoch()
            measured = run.finish_epoch()
            row = run.progress.rows[-1]
            if log is not None:
                log.log({name: value for name, value in row.items() if value is not None}, step=row["epoch"])
            if run.progress.epoch < recipe.epochs:
                run.save_if_due()
            on_epoch(row)
        if log is not None:
            log.finish()
        if measured is None:  # it was stopped after its last epoch
            measured, _ = run.evaluate()
        on_end(run.method.network, run.feed)
        record = run.record(measured)
        if run.main:
            if keep_checkpoint:
                run.save()
            if save and run.feed.split == "test":
                model.save(folder / model.NAME, run.method.network, recipe, run.feed)
                run.predictions(data.test_files).save(folder / PREDICTIONS)
            write_json(folder / "result.json", record)
            if not keep_checkpoint:
                (folder / checkpoint.NAME).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return record


def start(recipe: Recipe) -> "Accelerator":
    """Set the machine as the recipe says; the processes of the run."""
    with interrupts_end_at_once():
        from accelerate import Accelerator

    check_device(recipe.device if recipe.processes == 1 else "cpu")  # each of several has a device of its own
    if recipe.compile and recipe.compile not in torch.compiler.list_backends(exclude_tags=()):
        raise LabError(f"compile {recipe.compile} is no backend of torch.compile here; it has {', '.join(torch.compiler.list_backends())}")
    if recipe.nesterov and not recipe.momentum:
        raise LabError("nesterov true needs a momentum above 0; give one, or leave nesterov out")
    # a run of one process does not use the accelerator's device, and cpu=True is refused after a run on a GPU in the same process
    cpu = recipe.device == "cpu" and recipe.processes > 1
    # the precision is the recipe's, whatever the launcher was configured for
    accelerator = Accelerator(cpu=cpu, device_placement=False, mixed_precision="no")
    if accelerator.num_processes != recipe.processes:
        raise LabError(
            f"this run is of {counted(recipe.processes, 'process')}, and {accelerator.num_processes} came; start it as before, with "
            "torchrun or accelerate launch where it had several"
        )
    torch.set_num_threads(recipe.threads)
    device = accelerator.device if recipe.processes > 1 else torch.device(recipe.device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # on which kernels and graphs are launched
        torch.backends.cudnn.benchmark = True  # almost all batches have one shape: its fastest convolutions are looked for once
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.precision == "tf32"
    return accelerator


def tracker(folder: Path, epoch: int) -> Any:
    """TensorBoard's event files in ``folder/events``; what an interrupted run wrote after its checkpoint is hidden."""
    from accelerate.tracking import TensorBoardTracker

    events = TensorBoardTracker("events", folder, purge_step=epoch + 1)
    events.start()
    return events


def metrics_csv(rows: list[dict[str, Any]]) -> str:
    """A line an epoch; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(["" if value is None else value for value in row.values()] for row in rows)
    return text.getvalue()


def averaged(values: list[float]) -> dict[str, list[float]]:
    """The curve of ``values`` over batches, averaged over equal stretches so that a long run stays a small file."""
    stretches = np.array_split(np.asarray(values), min(CURVE_POINTS, len(values)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return {"batch": ends.tolist(), "rho": [float(stretch.mean()) for stretch in stretches]}
