"""``lab.compare``: losses compared in a training function of the user's own."""

import dataclasses
import functools
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("cloudpickle")
pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import largemargin
from combinations import every
from largemargin import lab
from largemargin.lab import cli, stats
from largemargin.lab.commands import comparing, own
from largemargin.lab.commands.comparing import summarised
from largemargin.lab.comparison.folder import write_marker
from largemargin.lab.comparison.own import OwnComparison
from largemargin.lab.comparison.recommendation import advice
from largemargin.lab.comparison.table import as_json
from largemargin.lab.errors import LabError, RunFailed
from largemargin.lab.predictions import Predictions
from largemargin.lab.queue import local
from largemargin.lab.results import TrialRecord, result_of
from largemargin.lab.run.methods import METHODS
from largemargin.lab.trial.digest import digest_of
from largemargin.lab.trial.losses import given_losses
from largemargin.lab.trial.run import Run
from largemargin.lab.trial.trial import Trial
from largemargin.lab.trial.work import Sent, do, scores_of

FEATURES, LABELS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def fit(run, rows=slice(None), steps=4):
    """A linear classifier of random features; its logits."""
    model = run.head(8, 3, num_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(FEATURES[rows])
        loss = run.loss(logits, LABELS[rows], features=FEATURES[rows], head=model)
        loss.backward()
        optimizer.step()
        run.log(epoch=step, loss=loss.item())
    with torch.no_grad():
        return model.eval()(FEATURES)


def train(run):
    run.seed_everything()
    return run.score(fit(run), LABELS)


def sent(function=train, factories=None, losses=("softmax", "large_margin", "mine")):
    return Sent(function, factories or {}, {**dict.fromkeys(losses, "d"), **dict.fromkeys(METHODS, "d")})


SOFTMAX = Trial("softmax", 0, word="softmax")


def done(tmp_path, function=train, trial=SOFTMAX, factories=None, **options):
    """The record of a run, done in this process."""
    return do(trial, sent(function, factories), tmp_path, **options)


# one run


@every("word", list(METHODS))
def test_every_word_trains_in_a_loop_of_ones_own(word, tmp_path):
    def counted(run):
        run.class_counts = torch.bincount(LABELS)
        return train(run)

    record = done(tmp_path, counted, Trial(word, 0, word=word))
    assert record["scores"].keys() == {"error", "margin", "rho", "ece", "nll"}
    assert all(torch.tensor(list(record["scores"].values())).isfinite()) and len(record["log"]) == 4


@every("word", ["softmax", "label_smoothing", "large_margin", "gce", "focal"])
def test_the_loss_of_a_word_is_that_of_the_library(word, rng, tmp_path):
    logits, target = torch.randn(5, 3, generator=rng), torch.tensor([0, 1, 2, 0, 1])
    ours = {
        "softmax": nn.CrossEntropyLoss(),
        "label_smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
        "large_margin": largemargin.LargeMarginCrossEntropyLoss(lam=0.7),
        "gce": largemargin.GeneralizedCrossEntropyLoss(q=0.7),
        "focal": largemargin.FocalCrossEntropyLoss(gamma=2.0),
    }
    trial = Trial(word, 0, word=word, of_loss={"lam": 0.7} if word == "large_margin" else {})
    torch.testing.assert_close(Run(trial, None, tmp_path).loss(logits, target), ours[word](logits, target))


def test_the_margin_of_a_head_is_in_the_loss_and_not_in_the_logits(rng, tmp_path):
    run = Run(Trial("cosface", 0, word="cosface"), None, tmp_path)
    head, features, target = run.head(8, 3), FEATURES[:6], LABELS[:6]
    plain = head(features)
    loss = run.loss(plain, target, features=features, head=head)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(head(features, target), target))
    assert loss > nn.functional.cross_entropy(plain, target)


@every(
    "word",
    [word for word, known in METHODS.items() if known.head != "linear" or "center" in known.settings or "symmetry" in known.settings],
)
def test_a_loss_that_needs_more_than_logits_says_so_in_one_sentence(word, tmp_path):
    run = Run(Trial(word, 0, word=word), None, tmp_path)
    with pytest.raises(LabError, match=rf"the loss {word} .*run\.loss\(logits, target, features=features") as said:
        run.loss(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert "\n" not in str(said.value)


def test_a_loss_of_class_sizes_asks_for_them(tmp_path):
    run = Run(Trial("logit_adjusted", 0, word="logit_adjusted"), None, tmp_path)
    with pytest.raises(LabError, match=r"set run\.class_counts"):
        run.loss(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_a_plain_layer_in_place_of_a_head_is_refused(tmp_path):
    run = Run(Trial("cosface", 0, word="cosface"), None, tmp_path)
    with pytest.raises(LabError, match=r"needs the head that run\.head\(in_features, num_classes\) makes, got Linear"):
        run.loss(torch.zeros(2, 3), torch.tensor([0, 1]), features=torch.zeros(2, 8), head=nn.Linear(8, 3))


def test_a_loss_of_ones_own_is_a_name_and_what_makes_it(tmp_path):
    trial = Trial("mine", 0, named=True)
    run = Run(trial, lambda: nn.MultiMarginLoss(), tmp_path)
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert run.loss(logits, target) == nn.MultiMarginLoss()(logits, target) and type(run.head(8, 3)) is nn.Linear
    assert run.lam is None and run.name == "mine"
    with pytest.raises(LabError, match="returned 3, which cannot be called"):
        Run(trial, lambda: 3, tmp_path)


def test_seeds_and_splits_are_those_of_the_pair(tmp_path):
    def of(word, seed, share=0.25):
        run = Run(Trial(word, seed, word=word, validation_fraction=share), None, tmp_path)
        run.seed_everything()
        return run.head(8, 3).weight, run.split(40)

    (first, split), (other, same), (_, elsewhere) = of("softmax", 1), of("large_margin", 1), of("softmax", 2)
    assert torch.equal(first, other)
    assert all(map(torch.equal, split, same)) and not torch.equal(split[1], elsewhere[1])
    assert len(split[1]) == 10 and sorted(torch.cat(split).tolist()) == list(range(40))
    training, held_out = of("softmax", 1, 0.0)[1]
    assert training.tolist() == list(range(40)) and not len(held_out)


def test_ids_make_samples_the_same_in_any_order(tmp_path):
    logits, shuffled = torch.randn(6, 3), torch.tensor([3, 1, 5, 0, 2, 4])
    for name, order in (("a", torch.arange(6)), ("b", shuffled)):
        run = Run(Trial("softmax", 0, word="softmax"), None, tmp_path)
        run.score(logits[order], LABELS[:6][order], ids=[f"image-{i}" for i in order.tolist()])
        run.predictions.save(tmp_path / name)
    first, second = (Predictions.load(tmp_path / name) for name in "ab")
    assert (first.ids == second.ids).all() and (first.logits == second.logits).all() and (first.labels == second.labels).all()


# what train may return


def interrupts(run):
    raise KeyboardInterrupt


@every(
    "case",
    [
        (lambda run: None, "train returned nothing; return run.score"),
        (lambda run: 0.3, "train returned float 0.3; return run.score"),
        (lambda run: {}, "train returned an empty dictionary"),
        (lambda run: {"error": "low"}, "train returned 'low' as error, which is no number"),
        (lambda run: {"error": torch.zeros(3)}, "as error, which is no number"),
        (lambda run: {3: 0.5}, "train returned a number under 3; names must be text"),
        (lambda run: run.score(torch.zeros(4), LABELS[:4]), r"logits must be floating-point numbers of shape \(N, C\)"),
        (lambda run: run.score(torch.zeros(4, 3), torch.zeros(4)), r"target must be class indices of shape \(4,\)"),
        (lambda run: run.score(torch.zeros(4, 3), LABELS[:3]), r"target must be class indices of shape \(4,\), got .* \(3,\)"),
        (lambda run: run.score(torch.zeros(2, 3), torch.tensor([0, 3])), "target must be from 0 to 2, got 0 to 3"),
        (lambda run: run.score(torch.zeros(2, 3), torch.tensor([0, 1]), ids=["a", "a"]), "ids must be 2 different names"),
        (lambda run: run.score("logits", LABELS), "logits must be"),
        (lambda run: run.log(loss="low"), "run.log: loss must be a number, got 'low'"),
        (lambda run: sys.exit(3), r"train called sys.exit\(3\); let it return its scores"),
        (interrupts, "train raised KeyboardInterrupt, which ends a process; let it raise an ordinary error"),
    ],
)
def test_what_is_no_score_is_refused_in_one_sentence(case, tmp_path):
    function, said = case
    with pytest.raises(LabError, match=said) as caught:
        done(tmp_path, function)
    assert "\n" not in str(caught.value) and not (tmp_path / "result.json").exists()


def test_numbers_of_numpy_and_torch_are_numbers():
    import numpy as np

    assert scores_of({"f1": np.float32(0.5), "loss": torch.tensor(2.0), "n": 3}) == {"f1": 0.5, "loss": 2.0, "n": 3.0}


def test_a_function_that_changes_the_folder_is_brought_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def moves(run):
        os.chdir("/")
        return {"error": 1.0}

    done(tmp_path / "run", moves)
    assert Path.cwd() == tmp_path and (tmp_path / "run" / "result.json").is_file()


def test_several_lam_need_a_function_that_holds_out(tmp_path):
    validating = Trial("large_margin", 0, word="large_margin", of_loss={"lam": 1.0}, validation_fraction=0.2)
    with pytest.raises(LabError, match=r"with several lam, train must leave out a part .* ask run\.split"):
        done(tmp_path, train, validating)
    done(tmp_path, lambda run: {"error": run.validation}, validating)


# losses


class OfClasses(nn.Module):
    def __init__(self, num_classes):
        super().__init__()


@every(
    "case",
    [
        ("softmax", "losses must be a list, got 'softmax'"),
        ([], "losses is empty"),
        (["softmax", "nosuch"], '"nosuch", which is no loss of largemargin'),
        (["softmax", "softmax"], 'two have the name "softmax"'),
        (["softmax", ("softmax", nn.CrossEntropyLoss)], 'two have the name "softmax"'),
        ([("mine", 3)], "each loss is a word"),
        (
            [("mine", nn.MultiMarginLoss())],
            r'the loss "mine" is a module, MultiMarginLoss.*write \("mine", lambda: MultiMarginLoss\(\.\.\.\)\)',
        ),
        ([("mine", nn.functional.cross_entropy)], r'"mine" is called without arguments.*write \("mine", lambda: cross_entropy\)'),
        ([("mine", OfClasses)], r'"mine" is called without arguments.*write \("mine", lambda: OfClasses\(\.\.\.\)\)'),
        ([3], "losses has 3; each loss is a word"),
        ([{"lam": 1.0}], 'a dictionary of losses needs "loss"'),
        ([{"loss": "softmax", "lam": 1.0}], "lam is not a setting of softmax, which has none"),
        ([{"loss": "large_margin", "lam": -1}], "lam of the loss large_margin must be a finite number from 0 on, got -1"),
        ([{"loss": "large_margin", "divergence": "x"}], "divergence of the loss large_margin must be one of symmetric, kl_qu, kl_uq"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_sentence(case):
    losses, said = case
    with pytest.raises(LabError, match=said) as caught:
        given_losses(losses)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make", [nn.MultiMarginLoss, lambda: nn.functional.cross_entropy, functools.partial(nn.CrossEntropyLoss, label_smoothing=0.1), dict]
)
def test_what_can_be_called_without_arguments_may_make_a_loss(make):
    assert given_losses([("mine", make)])[0].factory is make


def test_settings_name_a_row_and_its_run():
    strong, weak = given_losses([{"loss": "large_margin", "lam": 1.0}, {"loss": "large_margin", "lam": 0.1, "name": "weak"}])
    comparison = OwnComparison("train", (strong.name, weak.name), OwnComparison.words_of([strong, weak]), lam=(0.3, 3.0))
    runs = [comparison.planned(loss, 0, "", lam=0.3) for loss in comparison.losses]
    assert [run.loss_label for run in runs] == ["large margin λ=1", "weak"] and [run.settings["lam"] for run in runs] == [1.0, 0.1]
    assert not comparison.choosing  # a lam that is given is not chosen


# identity


def test_a_run_is_its_loss_its_seed_and_its_settings():
    trial = Trial("large_margin", 0, word="large_margin", of_loss={"lam": 0.3}, given={"epochs": 3})
    changes: list[dict[str, Any]] = [{"seed": 1}, {"of_loss": {"lam": 1.0}}, {"given": {"epochs": 4}}, {"validation_fraction": 0.2}]
    changes += [{"device": "cuda"}, {"threads": 2}, {"loss": "other"}]
    ids = {dataclasses.replace(trial, **change).id for change in [{}, *changes]}
    assert len(ids) == 1 + len(changes)
    assert Trial(**json.loads(json.dumps(trial.to_dict()))).id == trial.id  # through a record
    assert dataclasses.replace(trial, device="cuda").id == dataclasses.replace(trial, device="cuda:1").id  # of another GPU of the machine
    assert Trial("../../x y", 0).id.startswith("x-y-seed0")


def test_the_digest_is_of_the_source():
    def one(run):
        return {"error": 1.0}

    def other(run):
        return {"error": 2.0}

    assert digest_of(one) == digest_of(one) != digest_of(other)
    assert digest_of(one, None) == digest_of(one) != digest_of(one, nn.MultiMarginLoss)
    namespaces: list[dict[str, Any]] = [{}, {}]
    for value, namespace in enumerate(namespaces):
        exec(f"def train(run): return {{'error': {value}}}", namespace)  # without a source
    assert digest_of(namespaces[0]["train"]) != digest_of(namespaces[1]["train"])


# a whole comparison, whose runs are done here


def finish(out, function=train, losses=("softmax", "large_margin"), seeds=range(3), lam=(0.3,), **fields):
    """Do the runs of a comparison in this process, as ``lab.compare`` would have left them."""
    given = given_losses(losses)
    comparison = OwnComparison(
        "train", tuple(one.name for one in given), OwnComparison.words_of(given), lam, tuple(seeds), device="cpu", **fields
    )
    digests = {one.name: digest_of(function, one.factory) for one in given}
    factories = {one.name: one.factory for one in given if one.factory}
    for trial in [
        *comparison.validating_recipes(),
        *(comparison.planned(loss, s, "", lam=one) for loss in comparison.losses for s in seeds for one in lam),
    ]:
        do(trial, Sent(function, factories, digests), out / "runs" / trial.id)
    write_marker(comparison, out)
    return comparison


def compare(out, function=train, losses=("softmax", "large_margin"), **options):
    return lab.compare(function, losses, **{"seeds": range(3), "out": out, "device": "cpu", "quiet": True, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("own")
    finish(out)
    return out


def test_finished_runs_are_not_repeated(finished):
    before = {path: path.read_bytes() for path in finished.glob("runs/*/*")}
    result = compare(finished)
    assert {path: path.read_bytes() for path in finished.glob("runs/*/*")} == before
    text = str(result)
    assert "test error %" in text and "large margin λ=0.3 beside softmax:" in text and str(result.report) in text
    assert "Over seeds and test samples: 95% interval" in text and "softmax" in result._repr_html_()
    page = result.report.read_text()
    for part in ("Losses compared in train", "Learning curves", "Margins", "Error of each class", "lab.compare(train"):
        assert part in page
    assert "augmentation" not in page and [row["loss"] for row in result.table] == ["softmax", "large_margin"]


def test_the_command_reads_the_folder(finished, capsys):
    compare(finished)
    assert cli.main(["report", str(finished), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"] == {"finished": 6, "planned": 6} and document["rows"][0]["error"] >= 0


def test_a_changed_source_is_refused_and_reuse_takes_it(finished):
    def changed(run):
        return {"error": 1.0}

    changed.__name__ = "train"
    with pytest.raises(LabError, match=r"the source of train.* has changed since 6 runs .* were done \(softmax, seed 0;.* reuse=True"):
        compare(finished, changed)
    before = {path: path.read_bytes() for path in finished.glob("runs/*/result.json")}
    assert len(compare(finished, changed, reuse=True).rows) == 2
    assert {path: path.read_bytes() for path in finished.glob("runs/*/result.json")} == before


def test_one_run_of_another_source_was_done(tmp_path):
    finish(tmp_path, losses=["softmax"], seeds=[0])
    with pytest.raises(LabError, match=r"has changed since 1 run of .* was done \("):
        compare(tmp_path, lambda run: {"error": 1.0}, losses=["softmax"], seeds=[0])


def test_lam_is_chosen_by_what_was_held_out(tmp_path):
    def function(run):
        held_out = bool(len(run.split(20)[1]))
        return {"accuracy": (run.lam or 0.0) + 0.01 * run.seed if held_out else 0.5 + 0.1 * run.seed}

    finish(tmp_path, function, lam=(0.1, 0.9, 0.5))
    result = compare(tmp_path, function, lam=(0.1, 0.9, 0.5))
    assert result.rows[1].label == "large margin λ=0.9" and "accuracy, higher is better, held out" in str(result)
    assert "How λ was chosen" in result.report.read_text()


@every("text", ["{", "[]", "{}", '{"trial": 3, "scores": {}}', '{"trial": {"loss": "softmax", "seed": 9}, "scores": {"error": 1}}'])
def test_a_record_that_no_run_has_written_is_named(text, tmp_path):
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    (tmp_path / "runs" / SOFTMAX.id).mkdir(parents=True)
    (tmp_path / "runs" / SOFTMAX.id / "result.json").write_text(text)
    with pytest.raises(LabError, match=r"result\.json is not the record of its run .*; remove it to run it again"):
        result_of(SOFTMAX, tmp_path / "runs")


# what is judged


def records(function, **fields):
    """Records of two losses and four seeds, from ``function(loss, seed)``."""
    given = given_losses(["softmax", "large_margin"])
    comparison = OwnComparison("train", ("softmax", "large_margin"), OwnComparison.words_of(given), seeds=(0, 1, 2, 3), **fields)
    return comparison, [TrialRecord(trial, function(trial.loss, trial.seed)) for trial in comparison.recipes()]


def test_the_first_number_is_judged_and_its_name_says_what_is_better():
    def function(loss, seed):
        better = loss == "large_margin"
        return {"f1": 0.5 + 0.01 * seed + better * (0.2 + 0.001 * seed), "loss": 2.0 + 0.1 * seed + better * (1.0 + 0.01 * seed)}

    comparison, found = records(function)
    row = summarised(comparison, found, None)[1]
    assert (row.metric.name, row.verdict) == ("f1", "better") and as_json(row)["f1"] == pytest.approx(0.7165)
    assert "in f1, 95% interval" in row.judged.sentences()[0] and "+0.20" in row.judged.text
    by_loss = dataclasses.replace(comparison, judged_by="loss")
    assert summarised(by_loss, found, None)[1].verdict == "worse"
    assert summarised(dataclasses.replace(by_loss, lower_is_better=False), found, None)[1].verdict == "better"


SPREAD = {"large_margin": 0.0, "focal": 0.4, "gce": 6.0}  # of the difference from softmax, which has an error of 5 to 6
NARROW, WIDER = (f"{stats.detectable_d_z(4) * spread / 3**0.5:.2g}" for spread in (0.4, 0.8))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["focal"], f"A true difference of {NARROW} in error would have been found 8 times in 10."),
        (["large_margin"], "show that another loss is better."),
        (
            ["focal", "gce"],
            f"A true difference of {NARROW} in error would have been found 8 times in 10, before the correction for several verdicts. "
            "For gce q=0.7 no possible gain would have been.",
        ),
        (["gce"], "No possible gain would have been found 8 times in 10: add seeds."),
    ],
)
def test_the_advice_states_a_difference_that_is_possible(others, said):
    losses = ["softmax", *others]
    comparison = OwnComparison("train", tuple(losses), OwnComparison.words_of(given_losses(losses)), seeds=(0, 1, 2, 3))
    found = [
        TrialRecord(trial, {"error": 5.0 + trial.seed / 3 + SPREAD.get(trial.loss, 0.0) * (-1) ** trial.seed / 2})
        for trial in comparison.recipes()
    ]
    (sentence,) = advice(summarised(comparison, found, None))
    assert sentence.startswith("Stay with softmax: these seeds do not show") and sentence.endswith(said)


def test_the_advice_says_how_much_the_losses_differ_in_what_they_show():
    losses = ["softmax", "focal", "large_margin"]
    comparison = OwnComparison("train", tuple(losses), OwnComparison.words_of(given_losses(losses)), seeds=(0, 1, 2, 3))
    of = {"softmax": 0.0, "focal": 0.4, "large_margin": 0.8}
    found = [TrialRecord(trial, {"error": 50.0 + of[trial.loss] * (-1) ** trial.seed / 2}) for trial in comparison.recipes()]
    (sentence,) = advice(summarised(comparison, found, None))
    assert (
        f"A true difference of {NARROW} to {WIDER} in error, depending on the loss, would have been found 8 times in 10, before" in sentence
    )


def test_a_number_that_a_run_lacks_is_named():
    comparison, found = records(lambda loss, seed: {"f1": 0.5} if seed else {"loss": 1.0}, judged_by="f1")
    with pytest.raises(LabError, match=r"train returned no f1 in the run softmax-seed0-\w+, but loss"):
        comparison.metric(found)


def test_a_number_that_is_not_finite_is_a_diverged_run():
    comparison, found = records(lambda loss, seed: {"loss": float("nan") if loss == "large_margin" and seed == 2 else 1.0 + seed})
    row = summarised(comparison, found, None)[1]
    assert (row.n, row.diverged) == (4, 1)


def test_samples_are_crossed_only_where_all_runs_have_the_same(tmp_path):
    def function(run):
        rows = torch.arange(60) if run.seed < 2 else torch.arange(1, 60)
        return run.score(fit(run)[rows], LABELS[rows])

    finish(tmp_path, function)
    (sentence,) = [one for one in compare(tmp_path, function).rows[1].judged.sentences() if "test samples: neither" in one]
    assert "other ids or other targets in some runs" in sentence


def test_samples_are_crossed_for_the_error_alone(tmp_path):
    def function(run):
        return {"f1": 0.5 + 0.1 * run.seed**2 * (run.lam or 1), **run.score(fit(run), LABELS)}

    finish(tmp_path, function)
    row = compare(tmp_path, function).rows[1]
    assert row.metric.name == "f1" and row.judged.paired.over_seeds_and_samples is None
    assert compare(tmp_path, function, metric="error").rows[1].metric.header == "test error %"


def test_a_run_that_was_not_foreseen_is_learnt_from_those_that_ended():
    from largemargin.lab.queue.budget import Budget, nothing_known

    budget, trials = Budget(1.0, measure=nothing_known), [Trial("softmax", seed, word="softmax") for seed in range(3)]
    budget.plan(trials, Path(), 1)
    assert budget.choose(trials) == trials[0]
    budget.started(trials[0])
    budget._running[trials[0].id].begun -= 1000.0
    budget.ended(trials[0], done=True)
    assert budget.seconds(trials[1]) >= 1000 and budget.choose(trials[1:]) is None


# what cannot be done


@every(
    "case",
    [
        (dict(train=3), "train must be a function"),
        (dict(train=lambda: {}), "train must take one argument, the run"),
        (dict(seeds=[0, -1]), "seeds must be whole numbers from 0 to 4,294,967,295"),
        (dict(seeds=[]), "seeds is empty"),
        (dict(seeds=[2**32]), "seeds must be whole numbers from 0 to"),
        (dict(lam=[]), "lam must be a finite number from 0 on, or several, got none"),
        (dict(lam=[0.1, "x"]), "lam must be a finite number from 0 on, or several, got 'x'"),
        (dict(lam=float("inf")), "lam must be a finite number from 0 on, or several, got inf"),
        (dict(timeout=0), "timeout must be a number of seconds above 0, got 0"),
        (dict(timeout="1"), "timeout must be a number of seconds above 0, got '1'"),
        (dict(minutes=-1.0), "minutes must be a number above 0, got -1.0"),
        (dict(jobs=0), "jobs must be a whole number from 1 on, got 0"),
        (dict(jobs=1.5), "jobs must be a whole number from 1 on, got 1.5"),
        (dict(threads=True), "threads must be a whole number from 1 on, got True"),
        (dict(lam=[0.1, 1], validation_fraction=1), "validation_fraction must be a number between 0 and 1, got 1"),
        (dict(metric=3), "metric must be the name of a number that train returns, got 3"),
        (dict(lower_is_better="yes"), "lower_is_better must be True, False or None, got 'yes'"),
        (dict(device=0), "device must be a text"),
        (dict(executor="dask"), "executor must be one of local, ray, got 'dask'"),
        (dict(settings={1: 2}), "settings must be a dictionary with text for names"),
        (dict(settings=[1]), r"settings must be a dictionary with text for names.*got \[1\]"),
        (dict(losses=["softmax"], lam=[0.1, 1]), "none of the losses softmax has a lam to choose"),
        (dict(settings={"model": object()}), "settings must hold numbers, texts and lists"),
        (dict(device="nosuch"), "no device of torch"),
        (dict(executor="ray", minutes=3), 'minutes is for executor="local"'),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_before_anything_is_written(case, tmp_path):
    options, said = case
    function = options.pop("train", train) if "train" in options else train
    with pytest.raises(LabError, match=said) as caught:
        compare(tmp_path / "out", function, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [None, 3, "", " "])
def test_a_folder_is_a_path(out):
    with pytest.raises(LabError, match="out must be the path of a folder, got"):
        compare(out)


def test_numbers_of_numpy_are_seeds(finished):
    import numpy as np

    assert [row.n for row in compare(finished, seeds=np.arange(3)).rows] == [3, 3]


def test_what_cannot_travel_is_named(tmp_path):
    lock = threading.Lock()

    def locked(run):
        return lock

    with pytest.raises(LabError, match=r"train cannot travel to the process of a run \(TypeError: cannot pickle '_thread.lock'"):
        compare(tmp_path / "out", locked)
    with pytest.raises(LabError, match='what makes the loss "mine" cannot travel'):
        compare(tmp_path / "out", losses=["softmax", ("mine", lambda: lock)])
    assert not (tmp_path / "out").exists()


def test_a_call_in_the_process_of_a_run_says_what_to_write(tmp_path, monkeypatch):
    inside = threading.Event()
    inside.set()
    monkeypatch.setattr(own, "inside", inside)
    with pytest.raises(LabError, match='put the call under if __name__ == "__main__":'):
        compare(tmp_path / "out")


@every(
    "case",
    [
        (["--train", "nosuch"], "give the module and the function"),
        (["--train", "nosuch:train"], "the module cannot be imported"),
        (["--train", "json:train"], "json has no train"),
        (["--train", "json:loads", "--data", "digits2"], "--data is for images"),
        (["--train", "json:loads", "--epochs", "3"], "--epochs is for images"),
        (["--train", "json:loads", "--recipe.momentum", "0.5"], "--recipe.momentum is for images"),
        (["--train", "json:loads", "--tensorboard"], "--tensorboard is for images"),
        (["--reuse"], "--reuse is for --train"),
    ],
)
def test_the_command_refuses_in_one_line(case, tmp_path, monkeypatch, capsys):
    words, said = case
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


# runs in processes


def script(folder, text, *words):
    """A script without ``if __name__``, in a process of its own."""
    (folder / "script.py").write_text(text)
    done = subprocess.run([sys.executable, "-W", "error", "script.py", *words], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


PLAIN = """
import torch
from torch import nn
from largemargin import lab

DATA = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, data):
        return self.layer(data)

def train(run):
    run.seed_everything()
    model, target = Network(), torch.arange(30) % 3
    print("printed in the run of", run.name, run.settings["rate"])
    with torch.no_grad():
        model.layer.weight -= run.settings["rate"] * (run.name == "mine")
    run.loss(model(DATA), target).backward()
    return run.score(model(DATA), target)

result = lab.compare(train, losses=["softmax", ("mine", lambda: nn.MultiMarginLoss())], seeds=[3], settings={"rate": 0.1}, out="out")
print(result)
"""


def test_a_script_needs_no_guard_and_its_functions_no_module(tmp_path, monkeypatch, capsys):
    printed = script(tmp_path, PLAIN)
    assert printed.count("2 runs of train") == 1 and "[2/2]" in printed and "mine" in printed
    assert "printed in the run" not in printed
    logs = {path.parent.name.split("-")[0]: path.read_text() for path in (tmp_path / "out").glob("runs/*/log.txt")}
    assert "printed in the run of mine 0.1" in logs["mine"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pkl", ".pickle")]
    first = {path: path.read_bytes() for path in (tmp_path / "out").glob("runs/*/result.json")}
    monkeypatch.chdir(tmp_path)
    runpy.run_path("script.py", run_name="__main__")  # in another process than the first time, so that it cannot tell by an address
    again = " ".join(capsys.readouterr().out.split())
    assert "2 already done" in again and "held a comparison" not in again
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("runs/*/result.json")} == first


@pytest.fixture(scope="module")
def unruly(tmp_path_factory):
    """A comparison whose runs do what they should not, in a process that has initialised CUDA: its folder and its result."""

    def train(run):
        assert "LEFT" not in os.environ  # each run has a process of its own
        if run.name == "dies":
            os._exit(7)
        if run.name == "hangs":
            print("an attempt", flush=True)
            while True:
                time.sleep(0.01)
        if os.fork() == 0:
            return {"error": 99.0}
        os.chdir("/")
        os.environ["LEFT"] = "something"
        return {"error": 1.0, "initialised": float(torch.cuda.is_initialized())}

    def no_call(*_):
        raise AssertionError("a comparison on the CPU calls CUDA")

    out = tmp_path_factory.mktemp("unruly")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_lazy_init", "mem_get_info", "get_device_name", "set_device"):
            patch.setattr(torch.cuda, name, no_call)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        losses = [(name, nn.CrossEntropyLoss) for name in ("leaves", "dies", "hangs")]
        return out, compare(out, train, losses, seeds=[0], timeout=10.0)


@pytest.mark.xdist_group("unruly")
def test_what_goes_wrong_in_a_run_is_told_and_the_others_go_on(unruly):
    out, result = unruly
    failures = {name.split("-")[0]: why for name, why in result.failures.items()}
    assert failures.keys() == {"dies", "hangs"}
    assert "died (status 7)" in failures["dies"] and "took longer than the timeout of 10 s" in failures["hangs"]
    done = {path.parent.name.split("-")[0]: json.loads(path.read_text()) for path in out.glob("runs/*/result.json")}
    assert done.keys() == {"leaves"} and done["leaves"]["scores"]["error"] == 1.0
    assert "1 of 3 runs is finished" in str(result) and "hangs-seed0" in str(result)
    (place,) = out.glob("runs/hangs*/error.txt")
    assert "in train" in place.read_text()  # where it hung
    assert (place.parent / "log.txt").read_text().count("an attempt") == 1  # a second would take as long again


@pytest.mark.xdist_group("unruly")
def test_a_process_that_has_initialised_cuda_starts_runs_that_have_not(unruly):
    """A forked process could not use CUDA: what the parent has set would be set there too."""
    out, _ = unruly
    (path,) = out.glob("runs/leaves*/result.json")
    assert json.loads(path.read_text())["scores"]["initialised"] == 0.0
    assert local.CONTEXT.get_start_method() == "spawn"


def test_an_error_of_train_is_told_and_the_others_go_on(here, tmp_path):
    def raises(run):
        if run.name == "softmax":
            raise ValueError("the learning rate is odd")
        return sys.exit(3) if run.name == "exits" else {"error": 1.0}

    result = compare(tmp_path, raises, losses=["softmax", ("exits", nn.CrossEntropyLoss), "large_margin"], seeds=[0])
    failures = {name.split("-")[0]: why for name, why in result.failures.items()}
    assert failures.keys() == {"softmax", "exits"} and failures["softmax"] == "ValueError: the learning rate is odd"
    assert "train called sys.exit(3)" in failures["exits"] and "1 of 3 runs is finished" in str(result)


def test_where_every_run_fails_there_is_a_result_without_a_table(here, tmp_path):
    def returns_nothing(run):
        return None

    result = compare(tmp_path, returns_nothing, losses=["softmax", "large_margin"], seeds=[0])
    assert [name.partition("-")[0] for name in result.failures] == ["softmax", "large_margin"]
    assert (result.table, result.rows, result.report) == ([], (), None)
    (line,) = str(result).splitlines()
    assert line.startswith("No run of returns_nothing finished, so there is no table; 2 runs failed: ")
    assert "2 runs failed: train returned nothing" in line and "softmax-seed0" in line and "error.txt" in line
    assert "train returned nothing" in result._repr_html_() and "<table" not in result._repr_html_()


@pytest.fixture
def fails(monkeypatch):
    """Let every run that is not finished fail, each for a reason of its own."""

    def run_all(recipes, runs, jobs, *_, **__):
        failed = [one for one in recipes if result_of(one, runs) is None]
        if failed:
            raise RunFailed("runs could not be done", {one.id: f"ValueError: {one.loss}" for one in failed})

    monkeypatch.setattr(comparing, "run_with_progress", run_all)


def test_reasons_that_differ_have_a_line_each(fails, tmp_path):
    result = compare(tmp_path)
    first, *others = str(result).splitlines()
    assert first == "No run of train finished, so there is no table; 6 runs failed:"
    assert [line.partition(" (")[0] for line in others] == ["3 runs: ValueError: softmax", "3 runs: ValueError: large_margin"]
    assert len(result.failures) == 6


def test_failures_are_told_where_the_minutes_ran_out_too(fails, tmp_path):
    assert len(compare(tmp_path, minutes=5.0).failures) == 6


def test_the_command_tells_that_every_run_failed_and_ends_with_1(fails, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop_that_fails.py").write_text("def train(run):\n    return None\n")
    words = ["compare", "--train", "loop_that_fails:train", "--losses", "softmax", "--seeds", "0", "1", "--out", "out", "--device", "cpu"]
    assert cli.main(words) == 1
    printed = capsys.readouterr()
    assert "No run of train finished" in printed.out
    assert printed.err == "largemargin: no run could be done; run the same command to try again.\n"
    assert cli.main([*words, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == [] and document["runs"] == {"finished": 0, "planned": 2}
    assert list(document["failures"].values()) == ["ValueError: softmax"] * 2


def carrying(value):
    def train(run):
        return {"error": value}

    return train


class Carries:
    def __init__(self, value):
        self.value = value

    def __call__(self, run):
        return {"error": self.value}


def of_address(run, thing):
    return {"error": 1.0}


@pytest.mark.parametrize(
    "made", [carrying, Carries, lambda value: functools.partial(of_address, thing=[value]), lambda value: Carries(value).__call__]
)
def test_the_digest_is_of_the_values_that_a_function_carries(made):
    assert digest_of(made(0.1)) == digest_of(made(0.1)) != digest_of(made(9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_digest_is_of_the_numbers_in_a_tensor_or_an_array(dtype):
    one, other = torch.tensor([[0, 1, 1]]).to(dtype), torch.tensor([[0, 0, 1]]).to(dtype)
    assert digest_of(carrying(one)) == digest_of(carrying(one.clone())) != digest_of(carrying(other))
    assert digest_of(carrying(one)) != digest_of(carrying(one.flatten()))
    weighted = [digest_of(lambda weight=weight: nn.CrossEntropyLoss(weight)) for weight in (one, one.clone(), other)]
    assert weighted[0] == weighted[1] != weighted[2]
    if dtype != torch.bfloat16:
        assert digest_of(carrying(one.numpy())) == digest_of(carrying(one.clone().numpy())) != digest_of(carrying(other.numpy()))


def test_the_digest_takes_tensors_without_numbers_at_hand():
    for thing in (
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        nn.Parameter(torch.zeros(2)),
        torch.zeros(2, dtype=torch.complex64),
    ):
        assert digest_of(carrying(thing)) == digest_of(carrying(thing))


def test_the_digest_has_no_address():
    assert digest_of(functools.partial(of_address, thing=object())) == digest_of(functools.partial(of_address, thing=object()))


@pytest.mark.parametrize("word", ["softmax", "cosface", "lsoftmax", "center", "noisy_softmax", "ldam"])
def test_the_random_numbers_of_a_loss_leave_those_of_train_alone(word, tmp_path):
    def drawn(loss):
        run = Run(Trial(loss, 0, word=loss), None, tmp_path)
        run.seed_everything()
        run.class_counts = torch.tensor([5, 4, 3])
        head, features, target = run.head(6, 3, num_steps=4), torch.ones(4, 6), torch.tensor([0, 1, 2, 0])
        run.loss(head(features), target, features=features, head=head)
        return torch.rand(3)

    assert torch.equal(drawn(word), drawn("softmax"))


def test_a_loss_that_is_only_measured_is_no_training_step(tmp_path):
    run = Run(Trial("gradual_super_symmetry", 0, word="gradual_super_symmetry"), None, tmp_path)
    head, features, target = run.head(6, 3, num_steps=4), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        losses = [run.loss(head(features), target, features=features, head=head).item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


OF_A_SCRIPT = """
import torch

EPOCHS = {epochs}
WEIGHT = torch.tensor([1.0, {weight}])


class Network:
    width = {width}

    def layers(self):
        return helper()


def helper():
    return {depth}


def train(run):
    return {{"error": EPOCHS * Network().layers() * WEIGHT[0]}}
"""


@pytest.mark.parametrize("changed", [{"epochs": 2}, {"width": 2}, {"depth": 2}, {"weight": 2}])
def test_the_digest_is_of_what_a_script_has_around_its_function(changed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for name, values in (("before", {}), ("again", {}), ("after", changed)):
        module = f"script_{name}_{'_'.join(changed)}"  # a module is imported once
        (tmp_path / f"{module}.py").write_text(OF_A_SCRIPT.format(**{"epochs": 1, "width": 1, "depth": 1, "weight": 1} | values))
        digests.append(digest_of(importlib.import_module(module).train))
    assert digests[0] == digests[1] != digests[2]


def test_seeds_that_are_a_number_are_told_to_be_several(tmp_path):
    with pytest.raises(LabError, match=r"seeds must be several whole numbers, or .auto., got 3; give range\(3\)"):
        lab.compare(train, ["softmax"], seeds=3, out=tmp_path)
