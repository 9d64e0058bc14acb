"""Lightning: batches may be dicts, or have more in them than input and target; what comes of them does not depend on that."""

import contextlib

import pytest
import torch
from torch.utils.data import DataLoader

from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # which Lightning's torchmetrics imports
lightning = pytest.importorskip("lightning")

from largemargin.integrations.lightning import LargeMarginClassifier, MarginLogger  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]

INPUTS, LABELS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5
FORMS = {
    "pair": (lambda input, label: (input, label), None),
    "dict": (lambda input, label: {"image": input, "label": label}, ("image", "label")),
    "dict with more": (lambda input, label: {"index": label + 7, "labels": label, "pixel_values": input}, ("pixel_values", "labels")),
    "dict of numbers": (lambda input, label: {0: label, 1: input}, (1, 0)),
    "triple": (lambda input, label: (label + 7, input, label), (1, 2)),
    "triple from the end": (lambda input, label: (input, label + 7, label), (0, -1)),
}


def loader(form: str) -> DataLoader:
    make, _ = FORMS[form]
    return DataLoader([make(input, label) for input, label in zip(INPUTS, LABELS, strict=True)], batch_size=8)


def classifier(keys) -> LargeMarginClassifier:
    torch.manual_seed(0)
    return LargeMarginClassifier(torch.nn.Linear(6, 5), lam=0.5, keys=keys)


def trainer():
    # on the CPU: the figures of all forms are equal bit for bit
    return lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[MarginLogger()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def run(form: str) -> tuple[dict[str, float], torch.Tensor]:
    module, runner = classifier(FORMS[form][1]), trainer()
    runner.fit(module, loader(form), loader(form))
    figures = {name: value.item() for name, value in runner.callback_metrics.items()}
    figures.update(runner.test(module, loader(form), verbose=False)[0])
    return figures, torch.cat(runner.predict(module, loader(form)))


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_batch_changes_nothing(form):
    figures, logits = run(form)
    expected, right = run("pair")
    assert figures == expected and {"train_loss", "val_loss", "test_loss", "train_margin"} <= figures.keys()
    torch.testing.assert_close(logits, right)


def test_a_prediction_needs_no_target():
    module = classifier(("image", "label"))
    logits = trainer().predict(module, DataLoader([{"image": input} for input in INPUTS], batch_size=24))
    torch.testing.assert_close(logits[0], module(INPUTS))


@pytest.mark.parametrize(
    ("form", "keys", "words"),
    [
        ("dict", None, r"got a dict with \['image', 'label'\].*keys=\(\"image\", \"label\"\)"),
        ("triple", None, r"got 3 in one.*keys=\(0, 1\)"),
        ("dict", ("image", "target"), r"must have 'target'.*keys=.*\['image', 'label'\]"),
        ("pair", ("image", "label"), "must have 'image'.*of 2"),
        ("pair", (0, 2), "must have 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(form, keys, words):
    with pytest.raises(ValueError, match=words):
        trainer().fit(classifier(keys), loader(form))


@pytest.mark.parametrize("keys", ["image", ("image",), ("image", "label", "index")])
def test_keys_name_two(keys):
    with pytest.raises(ValueError, match="keys must name the input and the target"):
        classifier(keys)
