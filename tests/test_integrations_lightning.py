"""The module and the callback for Lightning: it learns, and what is logged are the metrics of the logits of all batches."""

import contextlib
import doctest
import functools
import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from largemargin import metrics
from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # which torchmetrics imports where it is installed
pl = pytest.importorskip("lightning.pytorch")
integration = importlib.import_module("largemargin.integrations.lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]


def batches(num_rows: int, batch_size: int, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    target = torch.randint(4, (num_rows,), generator=generator)
    return DataLoader(TensorDataset(centres[target] + torch.randn(num_rows, 8, generator=generator), target), batch_size)


def trainer(folder, *callbacks, **options) -> "pl.Trainer":
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=[*callbacks], **{"max_epochs": 2, **quiet, **options}
    )


class Collect(pl.Callback):
    """Keeps the logits and targets of every batch, and what was logged at the end of each epoch."""

    def __init__(self) -> None:
        self.batches, self.epochs = {"train": [], "val": []}, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.batches["train"].clear()

    def on_validation_epoch_start(self, trainer, pl_module):
        self.batches["val"].clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches["train"].append((outputs["logits"], outputs["target"]))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches["val"].append((outputs["logits"], outputs["target"]))

    def on_train_epoch_end(self, trainer, pl_module):
        whole = {stage: tuple(map(torch.cat, zip(*rows, strict=True))) for stage, rows in self.batches.items()}
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


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"figures must be among 'rows'.*'margins'"):
        integration.MarginLogger(figures=["margins"])
    with pytest.raises(ValueError, match="lam"):
        classifier(lam=-1.0)

    class Forgetful(integration.LargeMarginClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(ValueError, match="training_step must return a dict with 'logits' and 'target'"):
        trainer(tmp_path, integration.MarginLogger()).fit(Forgetful(torch.nn.Linear(8, 4)), batches(40, 16, 1), batches(40, 16, 2))


RANKS = """
import sys, torch
from largemargin.lab._torchvision import import_torchvision
import_torchvision()
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from largemargin.integrations.lightning import LargeMarginClassifier, MarginLogger

torch.manual_seed(0)
train, val = TensorDataset(torch.randn(24, 8), torch.randint(4, (24,))), TensorDataset(torch.randn(12, 8), torch.randint(4, (12,)))
ranks = int(sys.argv[1])
trainer = pl.Trainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2, callbacks=[MarginLogger()], logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[2],
)
trainer.fit(LargeMarginClassifier(torch.nn.Linear(8, 4)), DataLoader(train, 24 // ranks), DataLoader(val, 3))
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
    assert len(found[0]) == 6 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_examples_run():
    result = doctest.testmod(integration)
    assert result.attempted and not result.failed
