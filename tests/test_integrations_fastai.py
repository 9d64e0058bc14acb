"""fastai: a Learner predicts probabilities and classes, and trains with the loss of the library."""

import contextlib
import pickle

import pytest
import torch
from torch import nn

from largemargin import large_margin_cross_entropy
from largemargin.integrations.fastai import LargeMarginLoss
from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # which fastai imports

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")]


def learner_of(loss, rng, device, **options):
    fastai = pytest.importorskip("fastai.learner", exc_type=ImportError)
    data = pytest.importorskip("fastai.data.core")
    pytest.importorskip("fastai.callback.progress")  # which gives the learner no_bar and no_logging
    features, classes = torch.randn(96, 8, generator=rng), torch.randint(5, (96,), generator=rng)
    features[:, 0] += 3 * classes
    rows = list(zip(features, classes, strict=True))
    batches = data.DataLoaders.from_dsets(rows[:64], rows[64:], bs=16, num_workers=0, device=device)
    torch.manual_seed(0)
    return fastai.Learner(batches, nn.Linear(8, 5), loss_func=loss, **options)


@contextlib.contextmanager
def quietly(learner):
    with learner.no_bar(), learner.no_logging():
        yield


def test_a_learner_trains_and_predicts_probabilities_and_classes(rng, device):
    learner = learner_of(LargeMarginLoss(lam=0.5), rng, device)
    with quietly(learner):
        before = learner.validate()[0]
        learner.fit(5, lr=0.1)
        probabilities, targets, classes, losses = learner.get_preds(with_decoded=True, with_loss=True)
        after = learner.validate()[0]
    assert after < before
    logits = learner.model(torch.stack([row for row, _ in learner.dls.valid_ds]).to(device)).detach().cpu()
    torch.testing.assert_close(torch.as_tensor(probabilities), logits.softmax(1))
    assert torch.equal(torch.as_tensor(classes), logits.argmax(1))
    expected = large_margin_cross_entropy(logits, targets, lam=0.5, reduction="none")
    torch.testing.assert_close(torch.as_tensor(losses), expected)
    assert after == pytest.approx(expected.mean().item(), rel=1e-5)


def test_mixup_interpolates_the_losses(rng, device):
    mixup = pytest.importorskip("fastai.callback.mixup", exc_type=ImportError)
    learner = learner_of(LargeMarginLoss(), rng, device, cbs=mixup.MixUp(0.4))
    with quietly(learner):
        learner.fit(1, lr=0.1)
    assert learner.recorder.values[0][0] > 0
    assert learner.loss_func.reduction == "mean"


def test_tensors_of_fastai_are_those_of_torch(rng):
    core = pytest.importorskip("fastai.torch_core", exc_type=ImportError)
    logits, target = torch.randn(6, 5, generator=rng, requires_grad=True), torch.randint(5, (6,), generator=rng)
    loss = LargeMarginLoss()(core.TensorBase(logits), core.TensorCategory(target))
    expected = large_margin_cross_entropy(logits, target)
    assert type(loss) is torch.Tensor
    torch.testing.assert_close(loss, expected)
    for got, right in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(torch.as_tensor(got).as_subclass(torch.Tensor), right)


# without fastai


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((2, 3, 5), -1), ((2, 5, 3, 4), 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_outputs_are_flattened_to_rows(shape, axis, reduction, rng, device):
    logits, weight = torch.randn(shape, generator=rng).to(device), torch.arange(1.0, 6, device=device)
    rows = logits.movedim(axis, -1).reshape(-1, 5)
    target = torch.randint(5, logits.movedim(axis, -1).shape[:-1], generator=rng).to(device)
    loss = LargeMarginLoss(axis=axis, lam=0.5, reduction=reduction, weight=weight)
    expected = large_margin_cross_entropy(rows, target.flatten(), weight, lam=0.5, reduction=reduction)
    torch.testing.assert_close(loss(logits, target), expected)
    probabilities = logits.movedim(axis, -1).softmax(-1)
    torch.testing.assert_close(loss.activation(logits), probabilities.movedim(-1, axis))
    assert torch.equal(loss.decodes(loss.activation(logits)), probabilities.argmax(-1))
    of_probabilities = large_margin_cross_entropy(rows, probabilities.reshape(-1, 5), weight, lam=0.5, reduction=reduction)
    torch.testing.assert_close(loss(logits, loss.activation(logits)), of_probabilities)


def test_a_column_of_targets_is_taken_as_rows(rng, device):
    # as fastai's tables give them
    logits, target = torch.randn(6, 5, generator=rng).to(device), torch.randint(5, (6, 1), generator=rng).to(device)
    torch.testing.assert_close(LargeMarginLoss()(logits, target), large_margin_cross_entropy(logits, target.flatten()))


def test_it_survives_pickle_and_says_its_axis():
    loss = pickle.loads(pickle.dumps(LargeMarginLoss(lam=0.7, axis=1)))
    assert (loss.lam, loss.axis) == (0.7, 1) and "axis=1" in repr(loss)
