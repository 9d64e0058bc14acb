"""The large margin under Lightning: a module that trains any classifier with it, and a callback that logs the margins.

Either package will do, ``lightning`` or ``pytorch_lightning``, whose classes are not the same: it is the one that is imported already,
else the one that is installed.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from largemargin import LargeMarginCrossEntropyLoss
from largemargin.metrics import MarginMetrics

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _package() -> Any:
    for name in [*filter(sys.modules.__contains__, _NAMES), *_NAMES]:
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise ImportError("largemargin.integrations.lightning needs Lightning, which is not installed: pip install lightning")


_Module: Any = _package().LightningModule
_Callback: Any = _package().Callback


class LargeMarginClassifier(_Module):  # type: ignore[misc]  # found at run time
    r"""A classifier trained with :class:`~largemargin.LargeMarginCrossEntropyLoss`, for Lightning's Trainer.

    Batches are pairs of input and target. It logs ``train_loss`` and ``val_loss``, and its steps return logits and target as
    :class:`MarginLogger` wants them.

    Args:
        network: takes the input of a batch and gives logits (N, C) or (N, C, d1, ..., dk).
        lam: the paper's lambda, at least 0.
        optimizer: makes the optimiser of the parameters, as ``functools.partial(torch.optim.SGD, lr=0.1)`` does.
        scheduler: makes the schedule of the optimiser, which steps once an epoch; ``None`` for none.
        settings: of :class:`~largemargin.LargeMarginCrossEntropyLoss`.

    Returns:
        When called with an input: logits.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.LargeMarginCrossEntropyLoss`.

    Example:
        >>> import torch
        >>> from largemargin.integrations.lightning import LargeMarginClassifier, MarginLogger
        >>> classifier = LargeMarginClassifier(torch.nn.Linear(16, 10), lam=0.3)
        >>> trainer = Trainer(max_epochs=10, callbacks=[MarginLogger()])  # doctest: +SKIP
        >>> trainer.fit(classifier, train_batches, val_batches)  # doctest: +SKIP

    Source: Kobayashi, BMVC 2019, eqs. (8) and (11).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lam: float = 0.3,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = LargeMarginCrossEntropyLoss(lam=lam, **settings)
        self.optimizer, self.scheduler = optimizer, scheduler

    def forward(self, input: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(input)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch, with logits and target."""
        return self._step("train", batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The loss of a batch, with logits and target."""
        return self._step("val", batch)

    def configure_optimizers(self) -> Any:
        """The optimiser, with its schedule if there is one."""
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def _step(self, stage: str, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        input, target = batch
        logits = self(input)
        loss = self.criterion(logits, target)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(target), sync_dist=True)
        return {"loss": loss, "logits": logits.detach(), "target": target}


class MarginLogger(_Callback):  # type: ignore[misc]
    r"""Logs the mean margin and the margin hidden in the loss, of training and of validation, once an epoch.

    The figures are means over the rows of all batches on all ranks, whatever the sizes of batches and of steps. In training they are of
    the logits that the loss saw, before the step that followed. They are logged as ``train_margin``, ``val_margin`` and so on, or
    ``val_margin_0``, ``val_margin_1`` where there are several loaders of validation, and can be monitored.

    Args:
        figures: which of those of :class:`~largemargin.metrics.MarginMetrics` are logged.
        settings: ``num_bins``, ``top_k``, ``ignore_index`` of :class:`~largemargin.metrics.MarginMetrics`.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.metrics.MarginMetrics`; ValueError for unknown ``figures``, and in the first step
            where ``training_step`` or ``validation_step`` does not return a dict with ``"logits"`` (N, C, ...) and ``"target"`` (N, ...).

    Example:
        >>> from largemargin.integrations.lightning import MarginLogger
        >>> logger = MarginLogger(figures=("margin", "rho_hat", "accuracy"))
        >>> Trainer(callbacks=[logger]).fit(module, train_batches, val_batches)  # doctest: +SKIP

    Source: Kobayashi, BMVC 2019, eq. (7) and Fig. 3.
    """

    def __init__(self, *, figures: Sequence[str] = ("margin", "rho_hat"), **settings: Any) -> None:
        super().__init__()
        known = MarginMetrics(**settings).compute()
        for name in figures:
            if name not in known:
                raise ValueError(f"figures must be among {', '.join(map(repr, known))}; got {name!r}")
        self.figures, self.settings = tuple(figures), settings
        self._counted: dict[str, list[MarginMetrics]] = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to count."""
        self._start("train", 1, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self._count("train", outputs, 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch."""
        self._log("train", pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to count."""
        self._start("val", len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches), pl_module)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        self._count("val", outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch."""
        self._log("val", pl_module)

    def _start(self, stage: str, num_loaders: int, pl_module: Any) -> None:
        device = "cpu" if pl_module.device.type == "mps" else pl_module.device  # no float64 there
        self._counted[stage] = [MarginMetrics(device=device, **self.settings) for _ in range(num_loaders)]

    def _count(self, stage: str, outputs: Any, loader: int) -> None:
        if not isinstance(outputs, dict) or not {"logits", "target"} <= outputs.keys():
            step = {"train": "training_step", "val": "validation_step"}[stage]
            came = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(f"{step} must return a dict with 'logits' and 'target', got {came}; return {{'loss': ..., 'logits': ...}}")
        self._counted[stage][loader].update(outputs["logits"], outputs["target"])

    def _log(self, stage: str, pl_module: Any) -> None:
        counted = self._counted.pop(stage)
        for loader, metrics in enumerate(counted):
            found = metrics.reduce().compute()
            suffix = f"_{loader}" if len(counted) > 1 else ""
            # the same on all ranks already; sync_dist says so to Lightning
            pl_module.log_dict({f"{stage}_{name}{suffix}": found[name] for name in self.figures}, sync_dist=True)
