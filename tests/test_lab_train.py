"""The training loop: seeds, pairs, resuming, records."""

import csv
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import PartialState

import largemargin
import processes
from largemargin.heads import CosineLinear
from largemargin.lab import models
from largemargin.lab.data.images import digits
from largemargin.lab.errors import LabError
from largemargin.lab.files import write_json
from largemargin.lab.run import evaluate, feeds, model, train, trainer
from largemargin.lab.run import method as methods
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.optimizer import learning_rates
from largemargin.lab.run.recipe import PLACES, Recipe

DIGITS = digits()


def part(num_train):
    """Digits: ``num_train`` to train on and 100 to test."""
    return dataclasses.replace(
        DIGITS,
        train_images=DIGITS.train_images[:num_train],
        train_labels=DIGITS.train_labels[:num_train],
        test_images=DIGITS.test_images[:100],
        test_labels=DIGITS.test_labels[:100],
    )


SMALL = part(200)


def recipe(**changes):
    settings = {"loss": "softmax", "seed": 0, "epochs": 2, "batch_size": 64, "crop_padding": 1}
    return Recipe(**{**settings, **changes})


@pytest.fixture
def device_recipe(device):
    """As :func:`recipe`, of runs on the device. Tests of equality bit for bit take :func:`recipe`, and compute on the CPU."""
    return functools.partial(recipe, device=device.type)


def without_time(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "images_per_second", "environment")}


def test_the_same_recipe_gives_the_same_run(tmp_path):
    first = train.train(recipe(), SMALL, tmp_path / "a")
    assert without_time(first) == without_time(train.train(recipe(), SMALL, tmp_path / "b"))
    assert first["epochs"] != train.train(recipe(seed=1), SMALL, tmp_path / "c")["epochs"]


def rows_of(recipe):
    return feeds.choose_rows(recipe, DIGITS.train_labels, 10)


def test_runs_of_one_seed_are_pairs():
    noisy = recipe(label_noise=0.3, train_fraction=0.5, validation_fraction=0.2)
    rows = rows_of(noisy)
    for loss in LOSSES:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, rows_of(dataclasses.replace(noisy, loss=loss)), strict=True))
    assert len(rows.training) + len(rows.validation) == 599 and len(rows.validation) == 120
    assert not torch.equal(rows.training_labels, rows_of(dataclasses.replace(noisy, seed=1)).training_labels)


def test_clean_and_noisy_runs_train_on_the_same_images():
    clean, noisy = (rows_of(recipe(label_noise=noise, train_fraction=0.5)) for noise in (0.0, 0.3))
    assert torch.equal(clean.training, noisy.training)
    assert (clean.training_labels != noisy.training_labels).sum() == round(0.3 * 599)


def test_a_run_stores_which_samples_it_trained_on_and_what_it_believed_of_them(device_recipe, tmp_path):
    noisy = device_recipe(label_noise=0.3, train_fraction=0.5, validation_fraction=0.25, epochs=1)
    train.train(noisy, SMALL, tmp_path)
    with np.load(tmp_path / "training_set.npz") as stored:
        assert len(stored["training"]) == 75 and len(stored["validation"]) == 25
        labels = np.concatenate([stored["training_labels"], stored["validation_labels"]])
        true = SMALL.train_labels.numpy()[np.concatenate([stored["training"], stored["validation"]])]
    assert (labels != true).sum() == 30


def test_a_validating_run_never_sees_the_test_set(tmp_path):
    validating = recipe(validation_fraction=0.25)
    record = train.train(validating, SMALL, tmp_path / "a")
    other = dataclasses.replace(SMALL, test_labels=SMALL.test_labels.flip(0), test_images=SMALL.test_images * 0)
    assert without_time(record) == without_time(train.train(validating, other, tmp_path / "b"))
    assert record["test"] is None and record["validation"]["error"] == record["epochs"][-1]["validation_error"]
    assert record["num_train"] == 150


def test_losses_of_one_seed_start_from_the_same_weights(tmp_path):
    # the first batch of the first epoch is seen before any update, so its rho is a fingerprint of weights, order and augmentation
    first = {
        train.train(recipe(loss=loss, lam=0.3, epochs=1, batch_size=200), SMALL, tmp_path / loss)["rho_of_batches"]["rho"][0]
        for loss in ("softmax", "large_margin")
    }
    assert len(first) == 1


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
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
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        "metrics.csv",
        "recipe.json",
        "result.json",
        "training_set.npz",
    ]


def test_the_learning_rate_is_the_papers(device_recipe, tmp_path):
    rates = [
        row["learning_rate"]
        for row in train.train(
            device_recipe(epochs=50, batch_size=200),
            dataclasses.replace(SMALL, train_images=SMALL.train_images[:4], train_labels=SMALL.train_labels[:4]),
            tmp_path,
        )["epochs"]
    ]
    np.testing.assert_allclose(rates, np.logspace(-1, -4, 50), rtol=1e-12)  # Sec. 4.1


def test_every_word_of_losses_builds_its_loss(rng, device):
    logits = torch.randn(7, 10, generator=rng).to(device)
    target = torch.arange(7, device=device)
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
    counts = torch.arange(1, 11, device=device)
    expected |= {word: expected["softmax"] for word in ("subcenter_arcface", "sphereface", "t_vmf")}
    expected |= {
        "gce": largemargin.generalized_cross_entropy(logits, target),
        "sce": largemargin.symmetric_cross_entropy(logits, target),
        "nce_rce": largemargin.normalized_reverse_cross_entropy(logits, target),
        "taylor": largemargin.taylor_cross_entropy(logits, target),
        "confidence_penalty": largemargin.confidence_penalty(logits, target),
        "maxsup": largemargin.max_suppression(logits, target),
        "focal": largemargin.focal_cross_entropy(logits, target),
        "dual_focal": largemargin.dual_focal_cross_entropy(logits, target),
        "poly1": largemargin.poly1_cross_entropy(logits, target),
        "mbls": largemargin.margin_label_smoothing(logits, target),
        "logit_adjusted": largemargin.logit_adjusted(logits, target, class_counts=counts),
        "ldam": largemargin.ldam(logits / 30, target, class_counts=counts),  # the classifier's logits are 30 cosines
    }
    assert expected.keys() == LOSSES.keys()
    for word, settings in LOSSES.items():
        loss = methods.build_loss(recipe(loss=word, **settings), counts)(logits, target)
        torch.testing.assert_close(loss, expected[word], msg=word)


SLOW = ("gce", "nce_rce", "taylor", "t_vmf")  # bounded losses, and a similarity that is flat at first


@pytest.mark.parametrize("word", LOSSES)
def test_every_loss_trains_on_the_device(word, device_recipe, device, tmp_path):
    short = device_recipe(epochs=3, batch_size=32, crop_padding=0, loss=word, **LOSSES[word])
    record = train.train(short, part(400), tmp_path, on_end=keep)
    first, *_, last = record["epochs"]
    assert last["train_error"] < first["train_error"] / (1 if word in SLOW else 2) or word == "dual_focal"
    # the margin of two grows from 0 over the run; gamma = 5 makes the steps of the third too long at this learning rate
    assert last["train_loss"] < first["train_loss"] or word in ("lsoftmax", "sphereface", "dual_focal")
    assert record["recipe"]["device"] == device.type
    assert {parameter.device.type for parameter in kept[0].parameters()} == {device.type}


def test_a_run_on_the_cpu_follows_one_on_another_device_in_the_same_process(tmp_path, monkeypatch):
    train.train(recipe(epochs=1), SMALL, tmp_path / "first")
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))  # as a run on a GPU leaves it
    assert train.train(recipe(epochs=1), SMALL, tmp_path / "second")["test"] is not None


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_the_word_of_a_cosine_head_has_the_margin_of_the_head(kind):
    assert LOSSES[kind]["margin"] == CosineLinear(2, 3, kind=kind).margin


def test_a_recipe_id_differs_with_every_field():
    base = recipe()
    changes = {"loss": "modified", "seed": 5, "data": "x", "network": "y", "device": "cuda", "flip": True}
    ids = {base.id}
    fields = [field.name for field in dataclasses.fields(Recipe) if field.name not in PLACES]
    changes |= dict.fromkeys(
        ("data_digest", "weights_digest", "augmentation", "crop_fill", "divergence", "schedule", "precision", "compile"), "0123"
    )
    changes |= {"milestones": (1, 2), "decay_all": False, "nesterov": True, "channels_last": True}
    for name in fields:
        ids.add(dataclasses.replace(base, **{name: changes[name] if name in changes else (getattr(base, name) or 0) + 0.5}).id)
    assert len(ids) == 1 + len(fields)
    assert dataclasses.replace(base, data="moved", data_root="moved").id == base.id  # the digest says which data it is, not the place


def test_records_are_strict_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1.0, math.nan, math.inf], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None, None], "b": {"c": None}}


def test_evaluation_agrees_with_definitions(device):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 6, generator=g)
    target = torch.randint(0, 6, (500,), generator=g)
    got = evaluate.evaluate(logits.to(device), target.to(device))
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


def test_perfect_confidence_has_no_calibration_error(device):
    logits, target = 1e4 * torch.eye(5, device=device), torch.arange(5, device=device)
    assert evaluate.expected_calibration_error(logits, target) == 0
    assert evaluate.expected_calibration_error(logits, (target + 1) % 5) == 1


WITH_HEADS = [word for word in LOSSES if word in ("lsoftmax", "gaussian_mixture", "noisy_softmax", "super_symmetric", "cosface", "arcface")]
WITH_TERMS = ["center", "center_large_margin", "gradual_super_symmetry"]


@pytest.mark.parametrize("word", [*WITH_HEADS, *WITH_TERMS])
def test_a_method_with_a_state_goes_on_where_it_stopped(word, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    long = recipe(epochs=3, loss=word, batch_size=50, **LOSSES[word])
    unbroken = train.train(long, SMALL, tmp_path / "unbroken")

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(long, SMALL, tmp_path / "broken", stop)
    assert without_time(train.train(long, SMALL, tmp_path / "broken")) == without_time(unbroken)


@pytest.mark.parametrize("word", [*WITH_HEADS, *WITH_TERMS])
def test_a_method_differs_in_training_from_the_plain_loss_and_predicts_by_plain_logits(word, rng, device):
    network = models.build(recipe(), 1, 10)
    method = methods.Method(recipe(loss=word, **LOSSES[word]), network, 10).to(device)
    images, target = torch.rand(20, 1, 8, 8, generator=rng).to(device), torch.arange(20, device=device) % 10
    for _ in range(2):  # a gradual weight is 0 at the first step
        step = method(images, target)
    if word != "super_symmetric":  # which is a form of the weights, not of the loss
        assert abs(float(step.loss.detach()) - float(method.criterion(step.plain, target).detach())) > 1e-7
    network.eval()
    torch.testing.assert_close(
        network(images), network.classifier(network.features(images), target) if word in WITH_HEADS else network(images)
    )


def test_what_is_measured_of_an_epoch_is_what_it_says(device_recipe, tmp_path):
    row = train.train(device_recipe(epochs=1, loss="large_margin", lam=0.3, learning_rate=1e-12), SMALL, tmp_path, on_end=keep)["epochs"][0]
    network, feed = kept
    logits, target = network(feed.normalize(SMALL.test_images.to(feed.device))).detach().cpu().double(), SMALL.test_labels
    stats = largemargin.row_stats(logits, target)
    for name, value in {
        "test_nll": F.cross_entropy(logits, target),  # plain, whatever the run trains with
        "test_loss": largemargin.large_margin_cross_entropy(logits, target, lam=0.3),
        "test_rho": stats.rho.mean(),
        "test_margin": largemargin.metrics.margin(logits, target),
        "test_error": 100 * (logits.argmax(-1) != target).double().mean(),
        "asymmetry": largemargin.heads.super_symmetry_penalty(network.classifier.weight.detach()),
    }.items():
        assert row[name] == pytest.approx(float(value), rel=1e-5), name
    with open(tmp_path / "metrics.csv") as file:
        (line,) = csv.DictReader(file)
    assert {name: float(value) for name, value in line.items()} == row


kept: list = []


def keep(*shown):
    kept[:] = shown


def test_the_share_of_logits_with_a_gradient_is_two_of_ten_at_most_for_the_hard_max(device_recipe, tmp_path):
    shares = {
        loss: train.train(device_recipe(loss=loss, **LOSSES[loss]), SMALL, tmp_path / loss)["epochs"][0]["gradient_share"]
        for loss in ("softmax", "crammer_singer_hinge", "hard_margin_softplus")
    }
    assert shares["softmax"] == 1
    assert shares["hard_margin_softplus"] == pytest.approx(0.2)
    assert 0 < shares["crammer_singer_hinge"] <= 0.2 + 1e-9


def test_the_test_set_is_measured_every_so_many_epochs_and_at_the_end(device_recipe, tmp_path):
    rows = train.train(device_recipe(epochs=5, evaluate_every=2), SMALL, tmp_path)["epochs"]
    assert [row["test_error"] is not None for row in rows] == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "log", "final_factor": 0.01}, [0.1, 0.1 * 10**-0.5, 0.01, 0.1 * 10**-1.5, 0.001]),
        ({"schedule": "steps", "milestones": (3, 1), "step_factor": 0.2}, [0.1, 0.02, 0.02, 0.004, 0.004]),
        ({"schedule": "cosine", "final_factor": 0.0}, [0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.1 * (1 - 0.5**0.5) / 2, 0.0]),
    ],
)
def test_schedules(schedule, expected):
    np.testing.assert_allclose(learning_rates(recipe(epochs=5, **schedule)), expected, atol=1e-15)


@pytest.mark.parametrize("schedule", ["log", "cosine"])
@pytest.mark.parametrize("epochs", [2, 3, 7])
def test_the_last_epoch_has_the_final_factor(schedule, epochs):
    rates = learning_rates(recipe(epochs=epochs, schedule=schedule, final_factor=0.01))
    np.testing.assert_allclose([rates[0], rates[-1]], [0.1, 0.001], rtol=1e-12)


def test_decay_can_leave_out_biases_and_normalisation():
    network = models.build(recipe(), 1, 10)
    groups = methods.parameter_groups(recipe(decay_all=False), network)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in network.named_parameters() if id(p) in decayed} == {
        name for name, p in network.named_parameters() if p.dim() > 1
    }
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_a_clipped_gradient_moves_the_weights_by_no_more(device_recipe, tmp_path):
    def moved(**changes):
        one = device_recipe(epochs=1, batch_size=200, learning_rate=1.0, momentum=0.0, weight_decay=0.0, final_factor=1.0, **changes)
        torch.manual_seed(feeds.seeded(one.seed, "weights").initial_seed())
        before = models.build(one, 1, 10)
        train.train(one, SMALL, tmp_path / one.id, on_end=keep)
        pairs = zip(before.parameters(), kept[0].parameters(), strict=True)
        return sum(((a - b.cpu()) ** 2).sum() for a, b in pairs).sqrt().item()

    assert moved(clip_norm=0.01) == pytest.approx(0.01, rel=1e-4) and moved() > 0.1


@pytest.mark.parametrize("changes", [{"precision": "bfloat16", "channels_last": True}, {"compile": "aot_eager"}, {"channels_last": True}])
def test_options_of_the_machine_train_as_well(changes, device_recipe, tmp_path):
    plain = train.train(device_recipe(epochs=8), SMALL, tmp_path / "plain")
    other = train.train(device_recipe(epochs=8, **changes), SMALL, tmp_path / "other")
    assert other["epochs"][0]["train_loss"] == pytest.approx(plain["epochs"][0]["train_loss"], rel=0.05)
    assert other["test"]["error"] < 40 and plain["test"]["error"] < 40


GRAPHS: list[object] = []  # what the backend "counting" was asked to compile


@torch._dynamo.register_backend(name="counting")
def counted(graph, example_inputs):
    GRAPHS.append(graph)
    return graph


def test_compiled_runs_of_one_shape_compile_one_graph_for_full_batches(tmp_path):
    """200 images in batches of 64 leave one of 8, and the split is measured after each of two epochs; those run without compiling."""
    torch.compiler.reset()
    GRAPHS.clear()
    for seed in (0, 1):
        plain = train.train(recipe(seed=seed), SMALL, tmp_path / f"plain{seed}")
        compiled = train.train(recipe(seed=seed, compile="counting"), SMALL, tmp_path / f"compiled{seed}")
        assert compiled["epochs"] == plain["epochs"]  # this backend runs its graph as it is
    assert len(GRAPHS) == 1


def test_what_is_compiled_is_not_in_the_state_of_a_run():
    """So checkpoints and weights are the same whether a run compiles or not."""
    method = methods.Method(recipe(), models.build(recipe(), 1, 10), 1)
    before = method.state_dict().keys()
    method.compile_features("counting", 64)
    assert method.state_dict().keys() == before


def test_weights_are_kept_and_are_those_of_the_network(device_recipe, tmp_path):
    train.train(device_recipe(epochs=1), SMALL, tmp_path, on_end=keep, save=True)
    again = models.build(recipe(weights=str(tmp_path / model.NAME)), 1, 10)
    for name, value in kept[0].state_dict().items():
        assert torch.equal(value.cpu(), again.state_dict()[name]), name


def test_tensorboard_is_written_and_goes_on(device_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(device_recipe(epochs=3), SMALL, tmp_path, tensorboard=True)
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("train_rho")] == [1, 2, 3]


def interrupted(folder, *words):
    """What ``interrupted.py`` did in ``folder``, and what it said."""
    script = Path(__file__).parent / "interrupted.py"
    done = subprocess.run([sys.executable, script, folder, *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return interrupted(tmp_path_factory.mktemp("ended"), "kill=7", "stop=8", "full=2")


@pytest.mark.xdist_group("ended")
@pytest.mark.parametrize(("how", "times", "expected"), [("kill", 7, -9), ("stop", 8, 143), ("full", 2, 2)])
def test_a_run_ended_anywhere_ends_bit_for_bit_as_an_undisturbed_one(how, times, expected, ended):
    assert_ends_as_an_undisturbed_one(how, times, expected, *ended)


@pytest.mark.slow
def test_a_run_ended_more_often_ends_bit_for_bit_as_an_undisturbed_one(tmp_path):
    assert_ends_as_an_undisturbed_one("kill", 20, -9, *interrupted(tmp_path, "kill=20"))


def assert_ends_as_an_undisturbed_one(how, times, expected, folder, happened, said):
    assert sum(status == expected for _, _, status in happened[how]) == times, happened
    if how == "full":
        assert "checkpoint.pt cannot be written" in said
    whole, broken = folder / "whole", folder / how
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}  # nothing half-written is left
    for name in ("metrics.csv", "recipe.json", "training_set.npz"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (broken, whole))
    for state in (ours, theirs):
        for name in ("seconds", "training_seconds"):
            del state["progress"][name]
    assert bits(ours) == bits(theirs)
    assert without_time(json.loads((broken / "result.json").read_text())) == without_time(json.loads((whole / "result.json").read_text()))


def bits(state):
    """Tensors as bytes, in whatever they lie."""
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape), state.contiguous().view(torch.uint8).numpy().tobytes() if state.dim() else state.item()
    if isinstance(state, dict):
        return {name: bits(value) for name, value in state.items()}
    return [bits(value) for value in state] if isinstance(state, (list, tuple)) else state


def test_a_checkpoint_of_another_recipe_is_refused(device_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(device_recipe(), SMALL, tmp_path, stop)
    with pytest.raises(LabError, match=r"threads 1 there, 2 here"):
        train.train(device_recipe(threads=2), SMALL, tmp_path)


def test_a_checkpoint_executes_nothing(device_recipe, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "executed", "x"))

    torch.save({"recipe": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(LabError, match=r"checkpoint.pt is not a checkpoint"):
        train.train(device_recipe(), SMALL, tmp_path)
    assert not (tmp_path / "executed").exists()


def launched(*arguments):
    """Two processes of ``processes.py``, which must ignore the precision that their launcher sets."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", processes.__file__]
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=200, env=environment)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of the runs of two processes, one of which was told to stop and has gone on since."""
    folder = tmp_path_factory.mktemp("processes")
    done = launched(folder, 18)  # of 4 epochs of 10 steps; it stops before an evaluation
    assert done.returncode != 0 and (folder / "broken" / "checkpoint.pt").is_file(), done.stderr[-3000:]
    assert not (folder / "broken" / "result.json").is_file()
    done = launched(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("name", [name for name, case in processes.CASES.items() if case.network == "plain"])
def test_two_processes_train_as_one_with_the_same_global_batch(name, two_processes, tmp_path):
    one = processes.run(name, tmp_path, 1)
    two = json.loads((two_processes / name / "result.json").read_text())
    batch_size = processes.CASES[name].batch_size
    assert two["environment"]["processes"] == 2 and two["environment"]["batch_of_a_process"] == -(-batch_size // 2)
    for ours, theirs in zip(two["epochs"], one["epochs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    weights, others = (torch.load(folder / "checkpoint.pt", weights_only=True)["method"] for folder in (tmp_path, two_processes / name))
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert weights


@pytest.mark.xdist_group("two_processes")
def test_two_processes_of_which_one_is_told_to_stop_go_on_and_end_as_undisturbed_ones(two_processes):
    whole, broken = two_processes / "whole", two_processes / "broken"
    assert (whole / "metrics.csv").read_bytes() == (broken / "metrics.csv").read_bytes()
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (broken, whole))
    assert bits(ours["method"]) == bits(theirs["method"]) and bits(ours["optimizer"]) == bits(theirs["optimizer"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used here"),
        ({"device": "toaster"}, "--device toaster is no device of torch"),
        ({"compile": "nonsense"}, "compile nonsense"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
    ],
)
def test_what_the_machine_or_the_optimiser_cannot_do_is_refused_in_one_line(changes, said, tmp_path):
    with pytest.raises(LabError, match=said) as refused:
        train.train(recipe(**changes), SMALL, tmp_path / "run")
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_last_batch_of_one_sample_is_left_out(device_recipe, tmp_path):
    record = train.train(device_recipe(batch_size=199, evaluate_every=2), SMALL, tmp_path)
    assert record["num_train"] == 200 and record["rho_of_batches"]["batch"] == [1, 2]


def test_a_diverged_network_is_wrong_everywhere(device):
    logits = torch.full((4, 3), torch.nan, device=device)
    logits[0] = torch.tensor([2.0, 0, 0])
    assert evaluate.evaluate(logits, torch.zeros(4, dtype=torch.int64, device=device)).error == 75  # argmax of NaN is class 0
