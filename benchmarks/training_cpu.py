"""Claim: the lab trains the 13-layer network of the paper faster than a script with PIL transforms in a DataLoader.

The script's method: torchvision's PIL transforms in a DataLoader, float32, contiguous tensors, the loss as its formula under autograd.
Ours: the engine of ``largemargin train``, its data, measurements and all. Images are random, of CIFAR's size; two threads each; all in one
process, in turns. The input pipelines are measured alone as well, on one thread, without workers.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from common import formula, machine, options, write
from largemargin.lab._torchvision import import_torchvision
from largemargin.lab.data.images import ImageSet
from largemargin.lab.models import build
from largemargin.lab.run.feeds import InMemory
from largemargin.lab.run.machine import start
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.trainer import Run
from largemargin.lab.stopping import Told

BATCH, MEAN, STD = 128, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
RECIPE = Recipe(loss="large_margin", seed=0, lam=0.3, data="cifar100", network="layer13", epochs=1000, crop_padding=4, flip=True, threads=2)
PRECISIONS = {
    "float32, contiguous": RECIPE,
    "float32, channels last": dataclasses.replace(RECIPE, channels_last=True),
    "bfloat16, channels last": dataclasses.replace(RECIPE, channels_last=True, precision="bfloat16"),
}


def random_images(num_train: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_train, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(num_train) % 100
    return ImageSet(images, labels, images[:100], labels[:100], tuple(map(str, range(100))))


class PilImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR100 with the usual transforms."""

    def __init__(self, data: ImageSet) -> None:
        t = import_torchvision().transforms
        fill = tuple(int(255 * mean) for mean in MEAN)
        crop = t.RandomCrop(32, padding=4, fill=fill)
        self.transform = t.Compose([crop, t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(MEAN, STD)])
        self.arrays, self.labels = data.train_images.permute(0, 2, 3, 1).contiguous().numpy(), data.train_labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def script(data: ImageSet, workers: int) -> Callable[[], None]:
    """An epoch of the script's method."""
    torch.manual_seed(0)
    network = build(RECIPE, 3, 100)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(
        PilImages(data), batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch() -> None:
        network.train()
        for images, target in loader:
            loss = formula(network(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def engine(recipe: Recipe, data: ImageSet, folder: Path) -> Callable[[], None]:
    """An epoch of the lab's."""
    run = Run(recipe, data, folder, start(recipe), Told())

    def epoch() -> None:
        run.train_epoch()
        run.progress.epoch, run.progress.step = run.progress.epoch + 1, 0

    return epoch


def images_per_second(contestants: dict[str, Callable[[], None]], num_images: int, rounds: int) -> dict[str, list[float]]:
    """Of every round of every contestant, in turns; a first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            if turn:
                rates[name].append(num_images / (time.perf_counter() - started))
    return rates


def summary(rates: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Medians, and the median over rounds of the ratio to the baseline."""
    return {
        name: {
            "images per second": round(statistics.median(own), 1),
            "times the script": round(statistics.median(a / b for a, b in zip(own, rates[baseline], strict=True)), 2),
        }
        for name, own in rates.items()
    }


def pipelines(num_images: int, rounds: int) -> dict[str, dict[str, float]]:
    """The input alone, one thread."""
    data = random_images(num_images)
    loader = torch.utils.data.DataLoader(PilImages(data), batch_size=BATCH, shuffle=True)
    feed = InMemory(dataclasses.replace(RECIPE, threads=1), data, torch.device("cpu"))
    contestants = {"PIL in a DataLoader": lambda: consume(loader), "the lab's": lambda: consume(feed.training(0))}
    torch.set_num_threads(1)
    return summary(images_per_second(contestants, num_images, rounds), "PIL in a DataLoader")


def consume(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def main() -> None:
    """Measure the pipelines, then training."""
    chosen = options(__doc__)
    num_images, rounds = (BATCH, 1) if chosen.quick else (3 * BATCH, 5)
    alone = pipelines(BATCH if chosen.quick else 20 * BATCH, rounds)
    data = random_images(num_images)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        contestants: dict[str, Callable[[], None]] = {f"the script, {n} workers": script(data, n) for n in (0, 2)}
        contestants |= {f"the lab, {name}": engine(recipe, data, Path(folder)) for name, recipe in PRECISIONS.items()}
        rates = images_per_second(contestants, num_images, rounds)
    fastest = max((name for name in rates if name.startswith("the script")), key=lambda name: statistics.median(rates[name]))
    trained = summary(rates, fastest)
    results = {"input alone": alone, "training": trained, "compared with": fastest, "images a round": num_images}
    for part, rows in {"input alone": alone, "training": trained}.items():
        for name, row in rows.items():
            print(f"{part}: {name}: {row['images per second']} images/s, {row['times the script']} times")
    if not chosen.quick:
        write("training_cpu", {"claim": __doc__.splitlines()[0], "machine": machine(), **results}, chosen.out)


if __name__ == "__main__":
    main()
