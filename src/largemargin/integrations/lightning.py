"""The large-margin loss in Lightning: a module that trains any classifier with it, and a callback that logs margins.

The classes of ``lightning`` and ``pytorch_lightning`` differ. This module uses the package that is imported already, else an installed one.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from largemargin import LargeMarginCrossEntropyLoss, _checks
from largemargin._reduce import row_weights
from largemargin.metrics import MarginMetrics

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_STEPS = {"train": "training_step", "val": "validation_step"}


def _package() -> Any:
    for name in [*filter(sys.modules.__contains__, _NAMES), *_NAMES]:
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise ImportError("largemargin.integrations.lightning needs Lightning, which is not installed: pip install lightning")


Batch = Sequence[Tensor] | Mapping[str, Tensor]

_Module: Any = _package().LightningModule
_Callback: Any = _package().Callback


class LargeMarginClassifier(_Module):  # type: ignore[misc]  # found at run time
    r"""A classifier trained with :class:`~largemargin.LargeMarginCrossEntropyLoss`, for Lightning's Trainer.

    Batches are pairs of input and target, or have both under ``keys``; for prediction the input is enough. The module logs ``train_loss``,
    ``val_loss`` and ``test_loss`` over all labels of an epoch. Its steps return logits and target, which :class:`MarginLogger` needs.

    Checkpoints keep ``lam`` and ``settings`` only: ``LargeMarginClassifier.load_from_checkpoint(path, network=network)``.

    Args:
        network: takes the input of a batch and gives logits (N, C) or (N, C, d1, ..., dk).
        lam: the paper's lambda, at least 0.
        optimizer: makes the optimiser from the parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``.
        scheduler: makes the schedule from the optimiser, with one step per epoch; ``None`` for none.
        keys: the names or positions of input and target in a batch, such as ``("image", "label")``; by default a batch is a pair.
        settings: of :class:`~largemargin.LargeMarginCrossEntropyLoss`.

    Returns:
        When called with an input: logits. ``Trainer.predict`` gives the logits of each batch.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.LargeMarginCrossEntropyLoss`; ValueError in the first step if a batch lacks ``keys``.

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
        keys: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if keys is not None and (isinstance(keys, str) or len(keys) != 2):
            raise ValueError(f'keys must name the input and the target of a batch, as ("image", "label"), got {keys!r}')
        self.network, self.keys = network, keys
        self.criterion = LargeMarginCrossEntropyLoss(lam=lam, **settings)
        _checks.check_word("reduction", self.criterion.reduction, ("mean", "sum"))
        given = {"lam": lam, **settings}
        # weights_only would not load a numpy scalar, as from a sweep over lam
        self.save_hyperparameters({name: value.item() if type(value).__module__ == "numpy" else value for name, value in given.items()})
        self.optimizer, self.scheduler = optimizer, scheduler

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = self.network(input)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self._step("test", batch)

    def predict_step(self, batch: Tensor | Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The logits of a batch: an input, or a batch with the input under the first of ``keys``, by default its first element."""
        return self.forward(batch if isinstance(batch, Tensor) else self._of_batch(batch, 0))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def _of_batch(self, batch: Any, position: int) -> Tensor:
        """The input (0) or the target (1) of a batch."""
        key = position if self.keys is None else self.keys[position]
        if self.keys is None and not isinstance(batch, Sequence):
            kind = f"a {type(batch).__name__}" + (f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "")
            raise ValueError(f'batches must be pairs of input and target, got {kind}; name both, as in keys=("image", "label")')
        try:
            value: Tensor = batch[key]
        except (KeyError, IndexError, TypeError) as error:
            came = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__} of {len(batch)}"
            raise ValueError(f"batches must have {key!r}, which keys={self.keys} names, got {came}") from error
        return value

    def _step(self, stage: str, batch: Batch) -> dict[str, Tensor]:
        if self.keys is None and isinstance(batch, Sequence) and len(batch) != 2:
            raise ValueError(f"batches must be pairs of input and target, got {len(batch)} in one; give positions, as in keys=(0, 1)")
        input, target = self._of_batch(batch, 0), self._of_batch(batch, 1)
        logits = self(input)
        loss = self.criterion(logits, target)
        counted = self._denominator(logits, target)
        logged = torch.where(counted > 0, loss, 0.0)  # the mean over no labels is NaN, and 0 * NaN is NaN
        self.log(
            f"{stage}_loss", logged, on_step=False, on_epoch=True, reduce_fx=self.criterion.reduction, batch_size=counted, sync_dist=True
        )
        return {"loss": loss, "logits": logits.detach(), "target": target}

    def _denominator(self, logits: Tensor, target: Tensor) -> Tensor:
        """The denominator of the mean loss, a float because Lightning's mean over ranks would truncate an integer."""
        labels, weight = target, self.criterion.weight
        if _checks.is_probabilities(logits, target):
            labels, weight = torch.zeros_like(target[:, 0], dtype=torch.int64), None  # every row counts once
        return row_weights(labels, weight, self.criterion.ignore_index).sum()


def _check_words(name: str, given: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise TypeError(f"{name} must be a tuple of names, got {given!r}; give ({given!r},)")
    for word in given:
        if word not in known:
            raise ValueError(f"{name} must be among {', '.join(map(repr, known))}; got {word!r}")
    return tuple(given)


class MarginLogger(_Callback):  # type: ignore[misc]
    r"""Logs the mean margin and the mean margin hidden in the loss, for training and validation, once per epoch.

    The figures are means over the rows of all batches on all ranks. Training figures use the logits of the loss, before the optimiser step.
    Their names are ``train_margin``, ``val_margin`` and so on, or ``val_margin_0``, ``val_margin_1`` with several validation loaders; they
    can be monitored. Steps that Lightning skips, because ``training_step`` returned ``None``, do not count. An epoch resumed in its middle
    counts only the steps after the checkpoint.

    Args:
        figures: the figures of :class:`~largemargin.metrics.MarginMetrics` to log.
        stages: ``"train"``, ``"val"`` or both. Probabilities have no margin: with mixup leave ``"train"`` out.
        settings: ``num_bins``, ``top_k``, ``ignore_index`` of :class:`~largemargin.metrics.MarginMetrics`.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.metrics.MarginMetrics`; also for unknown ``figures`` or ``stages``, or a string; in
            the first step if a step does not return a dict with ``"logits"`` (N, C, ...) and class indices ``"target"`` (N, ...).

    Example:
        >>> from largemargin.integrations.lightning import MarginLogger
        >>> logger = MarginLogger(figures=("margin", "rho_hat", "accuracy"))
        >>> Trainer(callbacks=[logger]).fit(module, train_batches, val_batches)  # doctest: +SKIP

    Source: Kobayashi, BMVC 2019, eq. (7) and Fig. 3.
    """

    def __init__(
        self, *, figures: Sequence[str] = ("margin", "rho_hat"), stages: Sequence[str] = ("train", "val"), **settings: Any
    ) -> None:
        super().__init__()
        self.figures = _check_words("figures", figures, MarginMetrics(**settings).compute())
        self.stages = _check_words("stages", stages, tuple(_STEPS))
        self.settings = settings
        self._counted: dict[str, list[MarginMetrics]] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._counted.clear()  # an interrupted run may have left counts

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "train" not in self._counted:  # Lightning skips on_train_epoch_start if it resumes an epoch in its middle
            self._start("train", 1, pl_module)
        if outputs or not pl_module.automatic_optimization:  # else training_step returned None
            self._count("train", outputs, 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log("train", pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._start("val", len(trainer.num_val_batches), pl_module)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count("val", outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log("val", pl_module)

    def _start(self, stage: str, num_loaders: int, pl_module: Any) -> None:
        device = "cpu" if pl_module.device.type == "mps" else pl_module.device  # no float64 there
        self._counted[stage] = [MarginMetrics(device=device, **self.settings) for _ in range(num_loaders)]

    def _count(self, stage: str, outputs: Any, loader: int) -> None:
        if stage not in self.stages:
            return
        (other,) = _STEPS.keys() - {stage}
        way_out = f"return them, or leave it out: MarginLogger(stages=({other!r},))"
        if not isinstance(outputs, dict) or not {"logits", "target"} <= outputs.keys():
            came = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(f"{_STEPS[stage]} must return a dict with 'logits' and 'target', got {came}; {way_out}")
        if _checks.is_probabilities(outputs["logits"], outputs["target"]):
            raise ValueError(f"{_STEPS[stage]} must return class indices as 'target', got probabilities, as mixup makes them; {way_out}")
        self._counted[stage][loader].update(outputs["logits"], outputs["target"])

    def _log(self, stage: str, pl_module: Any) -> None:
        counted = self._counted.pop(stage, []) if stage in self.stages else []
        for loader, metrics in enumerate(counted):
            found = metrics.reduce().compute()
            suffix = f"_{loader}" if len(counted) > 1 else ""
            # equal on all ranks already; sync_dist tells Lightning so
            pl_module.log_dict({f"{stage}_{name}{suffix}": found[name] for name in self.figures}, sync_dist=True)
