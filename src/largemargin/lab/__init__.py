"""The experiment tool: the same network under several losses and seeds, on the same data (``pip install "largemargin[lab]"``)."""

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .commands.result import Result
    from .trial.run import Run

# installed by largemargin[lab]
NEEDED = (
    *("jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "jinja2", "torchvision", "PIL"),
    *("accelerate", "cloudpickle", "safetensors", "tensorboard"),
)

# of these, what a command does without
SPARED = {"reproduce": ("sklearn", "tensorboard")}


def load(model: str | os.PathLike[str]) -> "tuple[nn.Module, Callable[[Any], Tensor], tuple[str, ...]]":
    """The model of a run as ``(network, transform, classes)``; ``model`` is the run's folder or its ``model.safetensors``.

    ``network(images)`` gives logits (N, C) and is in eval mode, on the CPU. ``transform(picture)`` takes a PIL image and gives an input
    (channels, H, W), with the pixels that the held-out images had in training. For a run on features it takes numbers (N, D), or (D,)
    for one sample, and standardises them. ``classes[i]`` names logit i.
    """
    found = importlib.import_module(".run.model", __package__).load(model)
    return found.network, found.pixels, found.classes


def compare(
    train: "Callable[[Run], Mapping[str, float]]",
    losses: Iterable[Any] = ("softmax", "label_smoothing", "large_margin"),
    *,
    seeds: Iterable[int] | str = range(5),
    lam: float | Iterable[float] = 0.3,
    out: str | os.PathLike[str] = "runs/own",
    settings: Mapping[str, Any] | None = None,
    metric: str | None = None,
    lower_is_better: bool | None = None,
    validation_fraction: float = 0.2,
    max_seeds: int | None = None,
    device: str | None = None,
    threads: int = 1,
    jobs: int | None = None,
    executor: str = "local",
    minutes: float | None = None,
    timeout: float | None = None,
    reuse: bool = False,
    quiet: bool = False,
) -> "Result":
    """Compare losses in a training loop of your own: ``train(run)`` is called for each loss and seed, each time in a new process.

    ``train`` calls ``run.loss(logits, target)`` in its loop and returns ``run.score(logits, target)``, or a dictionary of numbers. Finished
    runs are kept in ``out``, and the same call continues where it stopped.

    Args:
        train: the function; it gets a :class:`~largemargin.lab.trial.run.Run`.
        losses: names from ``largemargin compare --losses``, pairs ``("mine", MyLoss)`` of a name and a class or function that makes the
            loss, and dictionaries ``{"loss": "large_margin", "lam": 1.0}``. The others are compared with ``softmax``.
        seeds: losses are compared seed by seed; ``"auto"`` adds seeds, up to ``max_seeds``, until every verdict is ``better`` or ``worse``.
        lam: lambda, the weight of the large-margin term. If several are given, one is chosen in runs that hold out
            ``validation_fraction`` of the training set, which ``train`` takes from ``run.split`` or ``run.validation``.
        out: the folder of the runs and the report.
        settings: numbers and texts for ``run.settings``. Other settings are other runs.
        metric: the number that runs are compared by; None: the first that ``train`` returns.
        lower_is_better: whether a lower number is better; None: decided by its name, such as ``error`` or ``loss``.
        device, threads: ``run.device``, and the threads of a run on the CPU.
        jobs: runs at a time; None: what suits the device.
        executor: ``"local"`` or ``"ray"``.
        minutes: start only runs that can finish in this time, all losses of a seed or none.
        timeout: seconds after which a run is ended and counts as failed.
        reuse: keep finished runs where the source of ``train`` has changed since.
        quiet: print no progress.

    Returns:
        The result: ``print(result)`` gives the table, the verdicts and the next steps, ``result.report`` is the page. ``result.failures``
        says why runs failed. If every run did, the table is empty and the page is None.
    """
    given = dict(locals())
    found: Result = importlib.import_module(".commands.own", __package__).compare(**given)
    return found
