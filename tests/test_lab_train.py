"""The training loop: seeds, pairs, resuming, records."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import largemargin
from largemargin.lab import data, evaluate, methods, models, train
from largemargin.lab.files import write_json
from largemargin.lab.recipe import LOSSES, Recipe

DIGITS = data.digits()
SMALL = dataclasses.replace(
    DIGITS,
    train_images=DIGITS.train_images[:200],
    train_labels=DIGITS.train_labels[:200],
    test_images=DIGITS.test_images[:100],
    test_labels=DIGITS.test_labels[:100],
)


def recipe(**changes):
    settings = {"loss": "softmax", "seed": 0, "epochs": 2, "batch_size": 64, "crop_padding": 1}
    return Recipe(**{**settings, **changes})


def without_time(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "environment")}


def test_the_same_recipe_gives_the_same_run(tmp_path):
    first = train.train(recipe(), SMALL, tmp_path / "a")
    assert without_time(first) == without_time(train.train(recipe(), SMALL, tmp_path / "b"))
    assert first["epochs"] != train.train(recipe(seed=1), SMALL, tmp_path / "c")["epochs"]


def test_runs_of_one_seed_are_pairs():
    noisy = recipe(label_noise=0.3, train_fraction=0.5)
    images, labels = train.training_set(noisy, DIGITS)
    for loss in LOSSES:
        other_images, other_labels = train.training_set(dataclasses.replace(noisy, loss=loss), DIGITS)
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
    assert len(labels) == 599
    assert not torch.equal(labels, train.training_set(dataclasses.replace(noisy, seed=1), DIGITS)[1])


def test_clean_and_noisy_runs_train_on_the_same_images():
    clean, noisy = (train.training_set(recipe(label_noise=noise, train_fraction=0.5), DIGITS) for noise in (0.0, 0.3))
    assert torch.equal(clean[0], noisy[0])
    assert (clean[1] != noisy[1]).sum() == round(0.3 * 599)


def test_losses_of_one_seed_start_from_the_same_weights(tmp_path):
    # the first batch of the first epoch is seen before any update, so its rho is a fingerprint of weights, order and augmentation
    first = {
        train.train(recipe(loss=loss, lam=0.3, epochs=1, batch_size=200), SMALL, tmp_path / loss)["rho_of_batches"]["rho"][0]
        for loss in ("softmax", "large_margin")
    }
    assert len(first) == 1


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    long = recipe(epochs=4, loss="large_margin", lam=0.3)
    unbroken = train.train(long, SMALL, tmp_path / "unbroken")

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(long, SMALL, tmp_path / "broken", stop)
    assert not (tmp_path / "broken" / "result.json").exists()
    seen = []
    resumed = train.train(long, SMALL, tmp_path / "broken", lambda row: seen.append(row["epoch"]))
    assert seen == [3, 4]
    assert without_time(resumed) == without_time(unbroken)
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["result.json"]


def test_the_learning_rate_is_the_papers(tmp_path):
    rates = [
        row["learning_rate"]
        for row in train.train(
            recipe(epochs=50, batch_size=200),
            dataclasses.replace(SMALL, train_images=SMALL.train_images[:4], train_labels=SMALL.train_labels[:4]),
            tmp_path,
        )["epochs"]
    ]
    np.testing.assert_allclose(rates, np.logspace(-1, -4, 50), rtol=1e-12)  # Sec. 4.1


def test_every_word_of_losses_builds_its_loss():
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    target = torch.arange(7)
    expected = {
        "softmax": F.cross_entropy(logits, target),
        "label_smoothing": F.cross_entropy(logits, target, label_smoothing=0.1),
        "large_margin": largemargin.large_margin_cross_entropy(logits, target, lam=0.3),
        "modified": F.cross_entropy(logits - F.one_hot(target, 10), target),
        "modified_large_margin": largemargin.large_margin_cross_entropy(logits, target, lam=0.3, hard_bias=1.0),
        "multiclass_hinge": F.multi_margin_loss(logits, target) * 10 / 9,
        "crammer_singer_hinge": largemargin.crammer_singer_hinge(logits, target),
        "hard_margin_softplus": largemargin.hard_margin_softplus(logits, target),
    }
    for word in (
        "lsoftmax",
        "gaussian_mixture",
        "noisy_softmax",
        "super_symmetric",
        "cosface",
        "arcface",
        "center",
        "gradual_super_symmetry",
    ):
        expected[word] = expected["softmax"]  # of the logits, which their classifiers or second terms change
    expected["center_large_margin"] = expected["large_margin"]
    assert expected.keys() == LOSSES.keys()
    for word, settings in LOSSES.items():
        loss = methods.build_loss(recipe(loss=word, **settings))(logits, target)
        torch.testing.assert_close(loss, expected[word], msg=word)


def test_a_recipe_id_differs_with_every_field():
    base = recipe()
    changes = {"loss": "modified", "seed": 5, "data": "x", "network": "y", "device": "cuda", "flip": True}
    ids = {base.id}
    fields = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("data", "data_root")]
    changes["data_digest"] = "0123"
    for name in fields:
        ids.add(dataclasses.replace(base, **{name: changes[name] if name in changes else (getattr(base, name) or 0) + 0.5}).id)
    assert len(ids) == 1 + len(fields)
    assert dataclasses.replace(base, data="moved", data_root="moved").id == base.id  # the digest says which data it is, not the place


def test_records_are_strict_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1.0, math.nan, math.inf], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None, None], "b": {"c": None}}


def test_evaluation_agrees_with_definitions():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 6, generator=g)
    target = torch.randint(0, 6, (500,), generator=g)
    got = evaluate.evaluate(logits, target)
    p = logits.double().softmax(-1)
    others = logits.double().scatter(1, target[:, None], -torch.inf)
    margins = logits.double().gather(1, target[:, None])[:, 0] - others.max(-1).values
    assert got.error == pytest.approx(100 * (margins < 0).double().mean().item())
    assert got.margin == pytest.approx(margins.mean().item())
    assert got.rho == pytest.approx((others.logsumexp(-1) - others.max(-1).values).mean().item())
    assert got.nll == pytest.approx(F.cross_entropy(logits.double(), target).item())
    assert sum(got.margin_histogram) == 500

    ece = 0.0  # bin by bin, as in Guo et al.
    confidence, prediction = p.max(-1)
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            ece += inside.sum().item() / 500 * abs((prediction == target)[inside].double().mean().item() - confidence[inside].mean().item())
    assert got.ece == pytest.approx(100 * ece)


def test_perfect_confidence_has_no_calibration_error():
    logits = 1e4 * torch.eye(5)
    assert evaluate.expected_calibration_error(logits, torch.arange(5)) == 0
    assert evaluate.expected_calibration_error(logits, (torch.arange(5) + 1) % 5) == 1


WITH_HEADS = [word for word in LOSSES if word in ("lsoftmax", "gaussian_mixture", "noisy_softmax", "super_symmetric", "cosface", "arcface")]
WITH_TERMS = ["center", "center_large_margin", "gradual_super_symmetry"]


@pytest.mark.parametrize("word", [*WITH_HEADS, *WITH_TERMS])
def test_a_method_with_a_state_goes_on_where_it_stopped(word, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    long = recipe(epochs=3, loss=word, batch_size=50, **LOSSES[word])
    unbroken = train.train(long, SMALL, tmp_path / "unbroken")

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(long, SMALL, tmp_path / "broken", stop)
    assert without_time(train.train(long, SMALL, tmp_path / "broken")) == without_time(unbroken)


@pytest.mark.parametrize("word", [*WITH_HEADS, *WITH_TERMS])
def test_a_method_differs_in_training_from_the_plain_loss_and_predicts_by_plain_logits(word):
    network = models.build("small", 1, 10)
    method = methods.Method(recipe(loss=word, **LOSSES[word]), network, 10)
    images, target = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
    for _ in range(2):  # a gradual weight is 0 at the first step
        plain, loss = method(network, images, target)
    if word != "super_symmetric":  # which is a form of the weights, not of the loss
        assert abs(float(loss.detach()) - float(method.criterion(plain, target).detach())) > 1e-7
    network.eval()
    torch.testing.assert_close(
        network(images), network.classifier(network.features(images), target) if word in WITH_HEADS else network(images)
    )
