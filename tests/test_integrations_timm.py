"""timm: its train script's loss with hard and smoothed labels, mixup and cutmix, and its training task."""

import importlib
from argparse import Namespace

import numpy as np
import pytest
import torch

from largemargin import LargeMarginCrossEntropyLoss
from largemargin.integrations.timm import train_loss
from largemargin.lab._torchvision import import_torchvision

import_torchvision()  # timm imports it, and it may not import by itself
timm = pytest.importorskip("timm")
for name in ("timm.data", "timm.loss"):
    importlib.import_module(name)

NUM_CLASSES = 10


def arguments(**given):
    """What timm's script has where nothing is asked for, but for its default smoothing of 0.1."""
    off = {"smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "jsd_loss": False, "bce_loss": False}
    return Namespace(**{**off, **given})


def mixing(args):
    return timm.data.Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        label_smoothing=args.smoothing,
        num_classes=NUM_CLASSES,
    )


def timms_loss(args):
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    return timm.loss.create_classification_loss(smoothing=args.smoothing, soft_targets=mixes)


CASES = {
    "hard": arguments(),
    "smoothed": arguments(smoothing=0.1),
    "mixup": arguments(mixup=0.8),
    "mixup, smoothed": arguments(mixup=0.8, smoothing=0.1),
    "cutmix": arguments(cutmix=1.0, smoothing=0.1),
    "cutmix by sizes": arguments(cutmix_minmax=[0.2, 0.8], smoothing=0.1),
    "both": arguments(mixup=0.8, cutmix=1.0, smoothing=0.1),
}


@pytest.fixture
def batch(rng, device):
    np.random.seed(0)  # timm's mixup draws from it
    return torch.randn(8, 3, 16, 16, generator=rng).to(device), torch.randint(NUM_CLASSES, (8,), generator=rng).to(device)


def targets_of(args, batch):
    images, labels = batch
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    return mixing(args)(images.clone(), labels)[1] if mixes else labels


@pytest.mark.parametrize("args", CASES.values(), ids=CASES)
def test_without_the_regulariser_it_is_timms_own_loss(args, batch, rng, device):
    target = targets_of(args, batch)
    logits = torch.randn(8, NUM_CLASSES, generator=rng).to(device)
    torch.testing.assert_close(train_loss(args, lam=0.0)(logits, target), timms_loss(args)(logits, target))


@pytest.mark.parametrize("args", CASES.values(), ids=CASES)
def test_timms_network_learns_a_batch(args, batch, device):
    images, labels = batch
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=NUM_CLASSES, in_chans=3).to(device)
    loss_fn = train_loss(args)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    mixes = targets_of(args, batch).dim() == 2
    inputs, target = mixing(args)(images.clone(), labels) if mixes else (images, labels)
    losses = []
    for _ in range(8):
        loss = loss_fn(network(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_batch_after_mixup_was_switched_off_is_that_of_the_labels(batch, rng, device):
    args = arguments(mixup=0.8)
    mixup = mixing(args)
    mixup.mixup_enabled = False  # what the script does from --mixup-off-epoch on: the targets stay probabilities
    images, labels = batch
    _, target = mixup(images.clone(), labels)
    logits = torch.randn(8, NUM_CLASSES, generator=rng).to(device)
    torch.testing.assert_close(train_loss(args)(logits, target), LargeMarginCrossEntropyLoss()(logits, labels))


def test_options_reach_the_loss():
    loss_fn = train_loss(arguments(smoothing=0.2), lam=1.0, divergence="kl_qu", hard_bias=0.5)
    assert (loss_fn.lam, loss_fn.divergence, loss_fn.hard_bias, loss_fn.label_smoothing) == (1.0, "kl_qu", 0.5, 0.2)


@pytest.mark.parametrize("name", ["jsd_loss", "bce_loss"])
def test_another_loss_is_refused(name):
    with pytest.raises(ValueError, match=f"args.{name} must be off"):
        train_loss(arguments(**{name: True}))


@pytest.mark.parametrize("loss", [name for name in getattr(timm.loss, "LOSS_TYPES", ["ce", "bce"]) if name != "ce"])
def test_another_loss_of_newer_scripts_is_refused(loss):
    with pytest.raises(ValueError, match=f"args.loss must be 'ce', got '{loss}'"):
        train_loss(arguments(loss=loss))


def test_several_labels_at_once_are_refused():
    with pytest.raises(ValueError, match=r"args\.task must not be 'multilabel'"):
        train_loss(arguments(task="multilabel"))


@pytest.mark.parametrize("loss", [None, "ce"])
def test_newer_scripts_that_ask_for_cross_entropy_get_ours(loss):
    assert train_loss(arguments(loss=loss, task="classification", smoothing=0.1)).label_smoothing == 0.1


def test_timms_training_task_takes_the_loss(batch, device):
    task_module = pytest.importorskip("timm.task")
    images, labels = batch
    network = timm.create_model("test_resnet", num_classes=NUM_CLASSES).to(device)
    task = task_module.ClassificationTask(network, criterion=LargeMarginCrossEntropyLoss(lam=0.3), device=device)
    result = task(images, labels)
    torch.testing.assert_close(result["loss"], LargeMarginCrossEntropyLoss(lam=0.3)(result["output"], labels))
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
