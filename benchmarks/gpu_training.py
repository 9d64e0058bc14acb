"""Claim: on a GPU one run of the 13-layer network fills the card where its step is a CUDA graph: several runs at once gain little.

The training epochs of ``largemargin train``, without evaluation, at batch 128 on random images of CIFAR's size: float32, TF32 and
bfloat16, with the graph of the step and without; one run, and 2, 3 and 4 at once, each a process. The input is measured alone as well.
First comes a profile of the bfloat16 graph: where its time goes, how long the card waits, and its share of what the matrix units reach in a
large product of the same dtype.
"""

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_common import Card, Kernel, Work, measure, rounded, start, summary
from torch.utils.flop_counter import FlopCounterMode
from training_cpu import BATCH, consume, random_images
from training_cpu import RECIPE as FLOAT32

from largemargin.lab.models import build
from largemargin.lab.run.feeds import InMemory
from largemargin.lab.run.machine import start as accelerator_of
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.trainer import Run
from largemargin.lab.stopping import Told

PATIENCE = 60.0  # seconds that a process waits for the others
TOP = 12  # kernels of the profile


class Case(NamedTuple):
    """A precision, and the images of an epoch: the slower, the fewer."""

    name: str
    recipe: Recipe
    num_images: int


@dataclass(frozen=True)
class TrainingWork(Work):
    """What is to be trained, and how often at once."""

    at_once: int
    seconds: float  # at least, of a measurement
    profiled: int  # batches
    side: int  # of the large product


def cases(recipe: Recipe, images: tuple[int, int, int], compiler: str) -> tuple[Case, ...]:
    last = dataclasses.replace(recipe, channels_last=True)
    return (
        Case("bfloat16, channels last", dataclasses.replace(last, precision="bfloat16"), images[0]),
        Case("bfloat16, channels last, inductor", dataclasses.replace(last, precision="bfloat16", compile=compiler), images[1]),
        Case("tf32, channels last", dataclasses.replace(last, precision="tf32"), images[1]),
        Case("float32", recipe, images[2]),
    )


ON_THE_CARD = dataclasses.replace(FLOAT32, device="cuda", threads=1)
SMALL = dataclasses.replace(FLOAT32, width=0.05, threads=1)
WORK = TrainingWork(
    cases=cases(ON_THE_CARD, (50_000, 200 * BATCH, 50 * BATCH), "inductor"),
    rounds=10,
    tests=("same_recipe or graph", "test_lab_train.py"),
    at_once=4,
    seconds=1.0,
    profiled=20,
    side=8192,
)
TINY = TrainingWork(
    cases=cases(SMALL, (2 * BATCH, 2 * BATCH, 2 * BATCH), "aot_eager"),
    rounds=2,
    tests=("learning_rate", "test_lab_train.py"),
    at_once=2,
    seconds=0.0,
    profiled=2,
    side=64,
)


class Engine:
    """A run of the lab's, epoch after epoch."""

    def __init__(self, case: Case, graph: bool, card: Card, folder: Path) -> None:
        recipe = case.recipe
        self.card = card
        self.run = Run(recipe, random_images(case.num_images), folder, accelerator_of(recipe), Told(), graph=graph)
        self.epoch()

    def epoch(self) -> None:
        self.run.train_epoch()
        self.run.progress.epoch, self.run.progress.step = self.run.progress.epoch + 1, 0

    def images_per_second(self, seconds: float) -> float:
        """Over whole epochs."""
        self.run.saved = time.monotonic()  # no checkpoint in between
        self.card.synchronize()
        started, images = time.perf_counter(), 0
        while not images or time.perf_counter() - started < seconds:
            self.epoch()
            images += self.run.num_samples
        self.card.synchronize()
        return images / (time.perf_counter() - started)


class Crew:
    """Processes that train at the same time: this one is the first and hears what the others measured."""

    def __init__(self, work: TrainingWork, card: Card) -> None:
        context = multiprocessing.get_context("spawn")
        self.barrier, self.rates = context.Barrier(work.at_once), context.Queue()
        arguments = (work, type(card), self.barrier, self.rates)
        self.others = [context.Process(target=follow, args=(rank, *arguments), daemon=True) for rank in range(1, work.at_once)]
        for process in self.others:
            process.start()

    def at_once(self, count: int, own: float | str) -> list[float | str]:
        """What the first ``count`` processes measured, or why they could not."""
        return [own, *(self.rates.get(timeout=PATIENCE) for _ in range(count - 1))]


def follow(rank: int, work: TrainingWork, card: type[Card], barrier: Barrier, rates: "Queue[float | str]") -> None:
    """The work of another process."""
    own = card()
    for case in work.cases:
        for graph in (True, False):
            for count, rate in turns(rank, case, graph, work, own, barrier):
                if rank < count:
                    rates.put(rate)


def turns(rank: int, case: Case, graph: bool, work: TrainingWork, card: Card, barrier: Barrier) -> Any:
    """For one run, two at once and so on: how many, and what process ``rank`` measured, which waits where it takes no part."""
    failed = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            engine = Engine(case, graph, card, Path(folder))
        except Exception as error:  # the others wait for this process
            failed = summary(error)
        for count in range(1, work.at_once + 1):
            barrier.wait(PATIENCE)
            rate: float | str = failed
            if rank < count and not failed:
                try:
                    rate = engine.images_per_second(work.seconds)
                except Exception as error:
                    rate = failed = summary(error)
            barrier.wait(PATIENCE)
            yield count, rate


def row_of(case: Case, graph: bool, count: int, rates: list[float | str]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "graph": graph, "at once": count}
    if failed := [rate for rate in rates if isinstance(rate, str)]:
        return row | {"failed": failed[0]}
    measured = [float(rate) for rate in rates]
    return row | {"images/s": rounded(sum(measured)), "ms a step": rounded(1000 * BATCH / statistics.mean(measured))}


def input_alone(case: Case, card: Card) -> float:
    """Images a second of an epoch's batches, of which nothing is trained."""
    feed = InMemory(case.recipe, random_images(case.num_images), torch.device(card.device))
    consume(feed.training(0))
    card.synchronize()
    started = time.perf_counter()
    consume(feed.training(1))
    card.synchronize()
    return case.num_images / (time.perf_counter() - started)


def flop_of_an_image(recipe: Recipe) -> float:
    """Of the convolutions and products of a step, forward and backward."""
    network = build(recipe, 3, 100).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(BATCH, 3, 32, 32, device="meta")).sum().backward()
    flop: int = counter.get_total_flops()
    return flop / BATCH


def flop_per_second(card: Card, work: TrainingWork) -> dict[str, float]:
    """What a large product reaches, in bfloat16 and in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32)):
        a, b = (torch.randn(work.side, work.side, device=card.device).to(dtype) for _ in range(2))
        taken = measure({name: lambda a=a, b=b: lambda: a @ b}, card, work.rounds)[name]["ms"]  # type: ignore[misc]
        found[name] = 2 * work.side**3 / taken * 1000
    return found


def profile(case: Case, card: Card, batches: int) -> dict[str, Any]:
    """The kernels of an epoch of a few batches."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            card.kernels(lambda: torch.ones(1, device=card.device))  # a graph that is older than the profiler may hide its kernels from it
            kernels = card.kernels(Engine(case._replace(num_images=batches * BATCH), True, card, Path(folder)).epoch)
        except Exception as error:  # the cases that are left are worth more
            return {"failed": summary(error)}
    taken: dict[str, list[float]] = {}  # microseconds
    for kernel in kernels:
        taken.setdefault(kernel.name, []).append(kernel.end - kernel.start)
    whole = sum(kernel.end - kernel.start for kernel in kernels)
    span = max(kernel.end for kernel in kernels) - kernels[0].start
    most = sorted(taken.items(), key=lambda item: -sum(item[1]))[:TOP]
    top = [
        {
            "kernel": name[:100],
            "share": rounded(sum(each) / whole),
            "us a step": rounded(sum(each) / batches),
            "a step": len(each) / batches,
        }
        for name, each in most
    ]
    return {
        "busy": rounded(busy(kernels) / span),
        "kernels a step": rounded(len(kernels) / batches),
        "us a step": rounded(span / batches),
        "top": top,
    }


def busy(kernels: list[Kernel]) -> float:
    """The microseconds in which at least one of the kernels runs; they are in the order of their starts."""
    total, end = 0.0, kernels[0].start
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, end))
        end = max(end, kernel.end)
    return total


def main() -> None:
    """Measure the input alone and take the profile; then train every case, one run and several at once."""
    card, record, work = start("training", __doc__, WORK, TINY)
    first = work.cases[0]
    reached, flop = flop_per_second(card, work), flop_of_an_image(first.recipe)
    of_card = {name: rounded(value / 1e12) for name, value in reached.items()}
    record.write(**{"batch": BATCH, "GFLOP an image": rounded(flop / 1e9), "TFLOP/s of a large product": of_card})
    # before there are other processes that train
    record.write(**{"input alone, images/s": rounded(input_alone(first, card)), "profile": profile(first, card, work.profiled)})
    card.release()
    crew = Crew(work, card)
    rows: list[dict[str, Any]] = []
    for case in work.cases:
        for graph in (True, False):
            for count, rate in turns(0, case, graph, work, card, crew.barrier):
                row = row_of(case, graph, count, crew.at_once(count, rate))
                if "images/s" in row and (peak := reached.get(case.recipe.precision)):
                    row["share of a large product's FLOP/s"] = rounded(row["images/s"] * flop / peak)
                rows.append(row)
                record.write(rows=rows)
                print(row, flush=True)
            card.release()
    record.finish()


if __name__ == "__main__":
    main()
