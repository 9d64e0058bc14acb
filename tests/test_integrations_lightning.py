"""The module and the callback for Lightning: it learns, and what is logged are the metrics of the logits of all batches."""

import contextlib
import doctest
import functools
import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from devices import DEVICE
from largemargin import LargeMarginCrossEntropyLoss, metrics
from largemargin.lab._torchvision import import_torchvision

ACCELERATOR = "cuda" if DEVICE.type == "cuda" else "cpu"  # Lightning knows no xpu

with contextlib.suppress(ImportError):
    import_torchvision()  # which torchmetrics imports where it is installed
pl = pytest.importorskip("lightning.pytorch")
integration = importlib.import_module("largemargin.integrations.lightning")

pytestmark = [
    pytest.mark.usefixtures("device"),  # which Lightning is given as its accelerator
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]


def resuming(test):
    """Lightning warns that the loader is not resumed, and that a folder of checkpoints is not empty."""
    for said in (".*ended before the epoch ended.*", "Checkpoint directory .*"):
        test = pytest.mark.filterwarnings(f"ignore:{said}")(test)
    return test


def batches(num_rows: int, batch_size: int, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    target = torch.randint(4, (num_rows,), generator=generator)
    return DataLoader(TensorDataset(centres[target] + torch.randn(num_rows, 8, generator=generator), target), batch_size)


def trainer(folder, *callbacks, **options) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator=ACCELERATOR, devices=1, default_root_dir=folder, callbacks=[*callbacks], **{"max_epochs": 2, **quiet, **options}
    )


class Collect(pl.Callback):
    """Keeps the logits and targets of every batch, and their figures at the end of each epoch."""

    def __init__(self) -> None:
        self.batches: dict[str, list[Any]] = {"train": [], "val": []}
        self.epochs: list[Any] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.batches["train"].clear()

    def on_validation_epoch_start(self, trainer, pl_module):
        self.batches["val"].clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches["train"].append((outputs["logits"], outputs["target"]))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches["val"].append((outputs["logits"], outputs["target"]))

    def on_train_epoch_end(self, trainer, pl_module):
        whole = {stage: tuple(map(torch.cat, zip(*rows, strict=True))) for stage, rows in self.batches.items() if rows}
        self.epochs.append({f"{s}_{f.__name__}": f(*rows).item() for s, rows in whole.items() for f in (metrics.margin, metrics.rho_hat)})


def classifier(**settings):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return integration.LargeMarginClassifier(network, optimizer=functools.partial(torch.optim.SGD, lr=0.1), **settings)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logged_figures_are_the_metrics_of_all_logits(accumulation, tmp_path):
    collect = Collect()
    run = trainer(tmp_path, integration.MarginLogger(), collect, accumulate_grad_batches=accumulation)
    run.fit(classifier(), batches(70, 16, 1), batches(50, 16, 2))  # the last batches are smaller
    logged = {name: value.item() for name, value in run.callback_metrics.items() if not name.endswith("loss")}
    assert logged == pytest.approx(collect.epochs[-1], rel=1e-5)
    assert collect.epochs[0] != collect.epochs[1]


ROWS, LENGTH, CLASSES = 10, 5, 4
SEEDED = torch.Generator().manual_seed(3)
LABELS = torch.randint(CLASSES, (ROWS,), generator=SEEDED)
SEQUENCES = torch.randint(CLASSES, (ROWS, LENGTH), generator=SEEDED)
SHARES = torch.rand(ROWS, CLASSES, generator=SEEDED).softmax(1)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 4.0])


def without(labels, ignore_index=-100):
    """The first batch of four wholly ignored, and one label of the second."""
    labels = labels.clone()
    labels[:4] = ignore_index
    labels.view(ROWS, -1)[5, 0] = ignore_index
    return labels


EPOCHS = {
    "unequal batches": (LABELS, {}),
    "ignored": (without(LABELS), {}),
    "weights": (LABELS, {"weight": WEIGHT}),
    "weights, ignored": (without(LABELS, 255).byte(), {"weight": WEIGHT, "ignore_index": 255}),
    "sequences, ignored": (without(SEQUENCES), {}),
    "probabilities": (SHARES, {}),
    "probabilities, weights": (SHARES, {"weight": WEIGHT}),
    "sum": (without(LABELS), {"reduction": "sum"}),
}


@pytest.mark.parametrize("target, settings", EPOCHS.values(), ids=EPOCHS)
def test_the_loss_of_an_epoch_is_that_of_all_its_labels_at_once(target, settings, tmp_path):
    torch.manual_seed(0)
    input = torch.randn(*target.shape[:1], 8, *(target.shape[1:] if target is not SHARES and target.dim() > 1 else ()))
    network = torch.nn.Linear(8, CLASSES) if input.dim() == 2 else torch.nn.Conv1d(8, CLASSES, 1)
    settings = {"lam": 0.5, "hard_bias": 1.0, **settings}
    standing = functools.partial(torch.optim.SGD, lr=0.0)
    model = integration.LargeMarginClassifier(network, optimizer=standing, **settings)
    loader = DataLoader(TensorDataset(input, target), batch_size=4)
    expected = LargeMarginCrossEntropyLoss(**settings)(network(input), target).item()

    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, loader, loader)
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    assert found == pytest.approx({"train_loss": expected, "val_loss": expected}, rel=1e-5)
    run.test(model, loader, verbose=False)
    assert run.callback_metrics["test_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_predictions_are_logits(tmp_path):
    model, pairs = classifier(), batches(50, 16, 2)
    (input, _), expected = pairs.dataset.tensors, model(pairs.dataset.tensors[0])
    for loader in (pairs, DataLoader(input, 16), DataLoader(TensorDataset(input), 16)):
        torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(model, loader)), expected)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_a_checkpoint_brings_the_loss_back(weight, tmp_path):
    model = classifier(lam=np.float64(0.7), hard_bias=1.0, divergence="kl_qu", weight=weight)
    logger = pl.loggers.CSVLogger(tmp_path)
    run = trainer(tmp_path, max_epochs=1, logger=logger)
    run.fit(model, batches(40, 16, 1), batches(40, 16, 2))
    run.save_checkpoint(tmp_path / "model.ckpt")
    load = functools.partial(
        integration.LargeMarginClassifier.load_from_checkpoint, tmp_path / "model.ckpt", weights_only=True, map_location="cpu"
    )
    again = load(network=classifier().network)
    input, target = batches(40, 16, 2).dataset.tensors
    torch.testing.assert_close(again.criterion(again(input), target), model.criterion(model(input), target))
    assert repr(again.criterion) == repr(model.criterion) and again.criterion.lam == 0.7
    other = load(network=classifier().network, lam=0.1)
    assert (other.criterion.lam, other.criterion.hard_bias) == (0.1, 1.0)
    trainer(tmp_path, max_epochs=2).fit(model, batches(40, 16, 1), batches(40, 16, 2), ckpt_path=tmp_path / "model.ckpt")


@resuming
def test_an_epoch_resumed_in_its_middle_counts_what_follows(tmp_path):
    def run(*callbacks, ckpt_path=None):
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        made = trainer(tmp_path, *callbacks, saving, enable_checkpointing=True, max_epochs=1)
        made.fit(classifier(), batches(70, 16, 1), batches(50, 16, 2), ckpt_path=ckpt_path)
        return made.callback_metrics

    stale = integration.MarginLogger()

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        run(stale, Break())
    for logger in (integration.MarginLogger(), stale):
        collect = Collect()
        found = run(logger, collect, ckpt_path=tmp_path / "step=3.ckpt")
        assert len(collect.batches["train"]) == 2
        expected = {name: pytest.approx(value, rel=1e-5) for name, value in collect.epochs[-1].items()}
        assert {name: found[name].item() for name in expected} == expected


@resuming
def test_a_run_that_keeps_its_best_within_epochs_is_resumed(tmp_path):
    def run(max_epochs, ckpt_path=None):
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", monitor="val_margin", mode="max", save_top_k=-1)
        made = trainer(tmp_path, integration.MarginLogger(), saving, enable_checkpointing=True, max_epochs=max_epochs, val_check_interval=2)
        made.fit(classifier(), batches(70, 16, 1), batches(50, 16, 2), ckpt_path=ckpt_path)
        return made.callback_metrics

    run(1)
    paths = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        assert {"train_margin", "val_margin"} <= run(2, path).keys()


def test_it_learns(tmp_path):
    seen = []

    class Losses(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["train_loss"].item())

    model = classifier(lam=0.5, scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5))
    run = trainer(tmp_path, integration.MarginLogger(figures=["accuracy"]), Losses(), max_epochs=4)
    run.fit(model, batches(200, 16, 1), batches(50, 16, 2))
    assert model.criterion.lam == 0.5
    assert seen[-1] < seen[0] / 2
    assert run.callback_metrics["val_accuracy"] > 0.8
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 16)


@resuming
def test_an_epoch_resumed_after_its_last_batch_logs_nothing(tmp_path):
    def run(ckpt_path=None):
        saving = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)  # after validation, before the epoch ends
        made = trainer(tmp_path, integration.MarginLogger(), saving, enable_checkpointing=True, check_val_every_n_epoch=2)
        made.fit(classifier(), batches(70, 16, 1), batches(50, 16, 2), ckpt_path=ckpt_path)
        return made.callback_metrics

    assert "train_margin" in run()
    assert not run(tmp_path / "last.ckpt")


def test_several_loaders_of_validation(tmp_path):
    loaders = [batches(50, 16, 2), batches(30, 16, 3)]
    model = classifier()
    run = trainer(tmp_path, integration.MarginLogger())
    run.fit(model, batches(40, 16, 1), loaders)
    for i, loader in enumerate(loaders):
        input, target = loader.dataset.tensors
        expected = metrics.margin(model(input), target).item()
        assert run.callback_metrics[f"val_margin_{i}"].item() == pytest.approx(expected, rel=1e-5)


def test_figures_can_be_monitored(tmp_path):
    stop = pl.callbacks.EarlyStopping("val_margin", mode="max", divergence_threshold=-100.0)
    run = trainer(tmp_path, integration.MarginLogger(), stop)
    run.fit(classifier(), batches(40, 16, 1), batches(40, 16, 2))
    assert stop.best_score.item() == pytest.approx(run.callback_metrics["val_margin"].item())


def test_settings_reach_the_metrics(tmp_path):
    loader = batches(50, 16, 2)
    model = classifier()
    run = trainer(tmp_path, integration.MarginLogger(figures=["top2_error"], top_k=2))
    run.validate(model, loader, verbose=False)
    input, target = loader.dataset.tensors
    expected = metrics.topk_error(model(input), target, k=2).item()
    assert 0 < expected and run.callback_metrics["val_top2_error"].item() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_none_is_not_counted(tmp_path):
    class Picky(integration.LargeMarginClassifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    run = trainer(tmp_path, integration.MarginLogger(figures=["rows"]), max_epochs=1)
    run.fit(Picky(torch.nn.Linear(8, 4)), batches(70, 16, 1), batches(50, 16, 2))
    assert run.callback_metrics["train_rows"] == 70 - 16


class Soft(integration.LargeMarginClassifier):
    """Trains on probabilities, as mixup's are, and validates on labels."""

    def training_step(self, batch, batch_idx):
        input, target = batch
        return super().training_step((input, torch.nn.functional.one_hot(target, 4).float()), batch_idx)


class Silent(integration.LargeMarginClassifier):
    """Its validation returns nothing."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


class Manual(integration.LargeMarginClassifier):
    """It goes its steps by itself, and its training returns nothing."""

    def __init__(self, network):
        super().__init__(network)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    "kind, stage, said", [(Manual, "train", r"got \[\]"), (Soft, "train", "class indices"), (Silent, "val", "got NoneType")]
)
def test_a_stage_without_margins_is_left_out(kind, stage, said, tmp_path):
    other = {"train": "val", "val": "train"}[stage]
    loaders = batches(70, 16, 1), batches(50, 16, 2)
    with pytest.raises(ValueError, match=rf"{said}.* leave it out: MarginLogger\(stages=\('{other}',\)\)"):
        trainer(tmp_path, integration.MarginLogger()).fit(kind(torch.nn.Linear(8, 4)), *loaders)
    run = trainer(tmp_path, integration.MarginLogger(stages=(other,)))
    run.fit(kind(torch.nn.Linear(8, 4)), *loaders)
    assert {name for name in run.callback_metrics if not name.endswith("loss")} == {f"{other}_margin", f"{other}_rho_hat"}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"figures must be among 'rows'.*'margins'"):
        integration.MarginLogger(figures=["margins"])
    with pytest.raises(TypeError, match=r"figures must be a tuple of names, got 'margin'; give \('margin',\)"):
        integration.MarginLogger(figures="margin")
    with pytest.raises(ValueError, match="stages must be among 'train', 'val'; got 'test'"):
        integration.MarginLogger(stages=("test",))
    with pytest.raises(ValueError, match="lam"):
        classifier(lam=-1.0)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'; got 'none'"):
        classifier(reduction="none")

    class Forgetful(integration.LargeMarginClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(ValueError, match="training_step must return a dict with 'logits' and 'target'"):
        trainer(tmp_path, integration.MarginLogger()).fit(Forgetful(torch.nn.Linear(8, 4)), batches(40, 16, 1), batches(40, 16, 2))


RANKS = """
import functools, sys, torch
from largemargin.lab._torchvision import import_torchvision
import_torchvision()
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from largemargin.integrations.lightning import LargeMarginClassifier, MarginLogger

torch.manual_seed(0)
train, val = TensorDataset(torch.randn(24, 8), torch.randint(4, (24,))), TensorDataset(torch.randn(12, 8), torch.randint(4, (12,)))
for data in (train, val):
    data.tensors[1][1:-2:2] = -100  # almost all of what the second rank sees is ignored
ranks = int(sys.argv[1])
trainer = pl.Trainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1,
    callbacks=[MarginLogger(figures=("rows", "margin", "ece"))], logger=False, default_root_dir=sys.argv[2],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
classifier = LargeMarginClassifier(torch.nn.Linear(8, 4), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
trainer.fit(classifier, DataLoader(train, 5), DataLoader(val, 3))
if trainer.is_global_zero:
    print("FIGURES", *(trainer.callback_metrics[name].item() for name in sorted(trainer.callback_metrics)))
"""


@pytest.mark.slow
def test_ranks_log_the_figures_of_all(tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    found = []
    for ranks in (1, 2):
        done = subprocess.run([sys.executable, "run.py", str(ranks), "."], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
        found.append([float(word) for word in line.split()[1:]])
    assert len(found[0]) == 8 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_without_lightning_the_install_line_is_said():
    code = "import sys; sys.modules.update({'lightning': None, 'pytorch_lightning': None}); import largemargin.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith("ImportError") and "pip install lightning" in done.stderr.splitlines()[-1]


def test_examples_run():
    result = doctest.testmod(integration)
    assert result.attempted and not result.failed
