"""The training loop: one recipe, one run."""

import dataclasses
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__, row_stats
from .data import ImageSet, augment, channel_moments, pollute_labels, subsample
from .errors import LabError
from .evaluate import evaluate
from .files import write_atomically, write_json
from .methods import Method, parameter_groups
from .models import build
from .recipe import Recipe

CHECKPOINT_SECONDS = 10.0  # an interrupted run loses at most this much, or one epoch
CURVE_POINTS = 300  # the curve over training batches is averaged down to this many points


def seeded(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """An independent stream of random numbers for each purpose and epoch: a resumed run draws what an unbroken one would."""
    words = np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def training_set(recipe: Recipe, data: ImageSet) -> tuple[Tensor, Tensor]:
    """The images and labels this run trains on: its subset of the training set, with its noise."""
    chosen = subsample(len(data.train_labels), recipe.train_fraction, seeded(recipe.seed, "subset"))
    labels = pollute_labels(data.train_labels[chosen], recipe.label_noise, len(data.classes), seeded(recipe.seed, "noise"))
    return data.train_images[chosen], labels


def commit() -> str:
    """The commit of the code, where it runs from its own checkout."""
    source = Path(__file__)
    git = ("git", "-C", str(source.parent))
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True)  # not the user's repository
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: str) -> dict[str, str]:
    """What the numbers of a run depend on beside its recipe."""
    return {
        "largemargin": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
    }


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of all images, in eval mode."""
    network.eval()
    return torch.cat([network(normalize(part)) for part in torch.split(images, 500)])


def train(
    recipe: Recipe,
    data: ImageSet,
    folder: Path,
    on_epoch: Callable[[dict[str, Any]], object] = lambda _: None,
    on_end: Callable[[nn.Module, Tensor], object] = lambda *_: None,
) -> dict[str, Any]:
    """Train by the recipe and write ``result.json`` into ``folder``; goes on from a checkpoint found there.

    ``on_epoch`` hears each epoch's measurements, ``on_end`` is shown the network in eval mode and the normalized training images. Returns
    what is in ``result.json``.
    """
    device = torch.device(recipe.device)
    images, labels = (part.to(device) for part in training_set(recipe, data))
    mean, std = (moment.to(device) for moment in channel_moments(data.train_images))

    def normalize(batch: Tensor) -> Tensor:
        return (batch.float() - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)

    torch.manual_seed(seeded(recipe.seed, "weights").initial_seed())
    network = build(recipe.network, images.shape[1], len(data.classes))
    method = Method(recipe, network, recipe.epochs * -(-len(labels) // recipe.batch_size))
    network, method = network.to(device), method.to(device)
    groups = parameter_groups(network, recipe.learning_rate)
    optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    learning_rates = recipe.learning_rate * np.logspace(0, -3, recipe.epochs)
    epochs: list[dict[str, Any]] = []
    rho_of_batches: list[float] = []
    seconds = 0.0

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        try:
            state = torch.load(checkpoint, map_location=device, weights_only=True)
        except Exception as error:  # torch.load raises many types for a broken file
            raise LabError(f"{checkpoint} is not a checkpoint that can be read; remove it to start this run anew") from error
        if "method" not in state:
            raise LabError(f"{checkpoint} was written by an older version; remove it to start this run anew")
        network.load_state_dict(state["network"])
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        epochs, rho_of_batches, seconds = state["epochs"], state["rho_of_batches"], state["seconds"]

    saved = time.monotonic()
    started = saved - seconds
    for epoch in range(len(epochs), recipe.epochs):
        torch.manual_seed(seeded(recipe.seed, "layers", epoch).initial_seed())  # for networks that draw, by dropout say
        augmentation = seeded(recipe.seed, "augmentation", epoch)
        order = torch.randperm(len(labels), generator=seeded(recipe.seed, "order", epoch)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = float(learning_rates[epoch]) * group["factor"]
        network.train()
        method.train()
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in torch.split(order, recipe.batch_size):
            target = labels[batch]
            batch_of_images = normalize(augment(images[batch], recipe.crop_padding, recipe.flip, mean, augmentation))
            logits, loss = method(network, batch_of_images, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                rho = row_stats(logits, target).rho
                totals += torch.stack([loss * len(batch), (logits.argmax(-1) != target).sum(), rho.sum()])
            rho_of_batches.append(rho.mean().item())
        evaluation = evaluate(predict(network, data.test_images.to(device), normalize), data.test_labels)
        train_loss, train_errors, train_rho = (totals / len(labels)).tolist()
        epochs.append(
            {
                "epoch": epoch + 1,
                "learning_rate": float(learning_rates[epoch]),
                "train_loss": train_loss,
                "train_error": 100 * train_errors,
                "train_rho": train_rho,
                "test_error": evaluation.error,
            }
        )
        if time.monotonic() - saved > CHECKPOINT_SECONDS and epoch + 1 < recipe.epochs:
            saved = time.monotonic()
            state = {"network": network.state_dict(), "method": method.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs}
            state |= {"rho_of_batches": rho_of_batches, "seconds": saved - started}
            write_atomically(checkpoint, lambda file, state=state: torch.save(state, file))  # type: ignore[misc]
        on_epoch(epochs[-1])

    on_end(network, normalize(images))
    result = {
        "recipe": recipe.to_dict(),
        "classes": list(data.classes),
        "num_train": len(labels),
        "num_test": len(data.test_labels),
        "environment": environment(recipe.device),
        "seconds": time.monotonic() - started,
        "test": dataclasses.asdict(evaluation),
        "epochs": epochs,
        "rho_of_batches": averaged(rho_of_batches),
    }
    write_json(folder / "result.json", result)
    checkpoint.unlink(missing_ok=True)
    return result


def averaged(values: list[float]) -> dict[str, list[float]]:
    """The curve of ``values`` over batches, averaged over equal stretches so that a long run stays a small file."""
    stretches = np.array_split(np.asarray(values), min(CURVE_POINTS, len(values)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return {"batch": ends.tolist(), "rho": [float(stretch.mean()) for stretch in stretches]}
