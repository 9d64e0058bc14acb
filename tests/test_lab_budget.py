"""``--minutes``: what starts, what is left, and what a machine says of itself."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from largemargin.lab import cli
from largemargin.lab.arguments import options
from largemargin.lab.commands import compare, reproduce
from largemargin.lab.commands import train as single
from largemargin.lab.commands.progress import say_what_is_left
from largemargin.lab.comparison.plan import Comparison
from largemargin.lab.errors import LabError
from largemargin.lab.queue import budget
from largemargin.lab.queue import runs as queue
from largemargin.lab.queue.attempt import Outcome
from largemargin.lab.queue.budget import Budget, Cost, cost_key, finish, pair_key
from largemargin.lab.queue.plan import Plan
from largemargin.lab.queue.runs import run_all
from largemargin.lab.run import environment
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.planned import Planned
from largemargin.lab.run.recipe import Recipe

THREE = ("softmax", "label_smoothing", "large_margin")
ONE_EPOCH = [Recipe(loss=loss, seed=seed, epochs=1, **LOSSES[loss]) for seed in range(4) for loss in THREE]
RECIPES = [Recipe(loss=loss, seed=seed, epochs=10, **LOSSES[loss]) for seed in range(4) for loss in THREE]
pytestmark = pytest.mark.usefixtures("forked_workers")


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(budget.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def planned(minutes, jobs=1, start=0.0, of_a_pass=6.0, recipes=RECIPES):
    """A budget on a machine that takes a minute a run of ten epochs."""
    given = Budget(minutes, measure=lambda *_: Cost(start, of_a_pass))
    given.plan(recipes, Path("runs"), jobs)
    return given


def simulated(plan, clock, jobs=1, seconds_an_epoch=6.0):
    """The runs that the plan gives out to ``jobs`` places, where each takes so long; in order."""
    started: list[Recipe] = []
    running: list[tuple[float, int, Recipe]] = []  # the end of an epoch, the epochs done by then
    while plan.unfinished:
        while len(running) < jobs and (recipe := plan.take()) is not None:
            started.append(recipe)
            running.append((clock.now + seconds_an_epoch, 1, recipe))
        clock.now, epoch, recipe = min(running, key=lambda item: item[0])
        running.remove((clock.now, epoch, recipe))
        plan.epoch(recipe, epoch)
        if epoch == recipe.epochs:
            plan.ended(recipe, Outcome("done"))
        else:
            running.append((clock.now + seconds_an_epoch, epoch + 1, recipe))
    return started


def names(recipes):
    return [(recipe.seed, recipe.loss) for recipe in recipes]


# the time of many runs


@pytest.mark.parametrize(
    ("places", "durations", "end"),
    [
        ([0, 0], [], 0),
        ([0], [5, 5, 5], 15),
        ([0, 0], [5, 5, 5], 10),
        ([4, 0], [5, 5], 9),
        ([4, 4], [5], 9),
        ([1, 2, 30], [5], 6),
    ],
)
def test_the_end_of_many_runs_is_that_of_a_queue(places, durations, end):
    assert finish(places, durations) == end


def test_more_places_never_take_longer():
    durations = [3.0, 7.0, 2.0, 2.0, 9.0, 4.0]
    ends = [finish([0.0] * jobs, durations) for jobs in range(1, 8)]
    assert ends == sorted(ends, reverse=True) and ends[0] == sum(durations) and ends[-1] == max(durations)


# pairs


def test_pairs_differ_in_their_loss_alone():
    keys = [pair_key(recipe) for recipe in RECIPES]
    assert len(set(keys)) == 4
    assert pair_key(RECIPES[0]) != pair_key(dataclasses.replace(RECIPES[0], label_noise=0.3))


def test_the_runs_of_a_seed_start_together_or_not_at_all(clock):
    plan = Plan(RECIPES, budget=planned(6.5))  # six runs fit, and half of another
    assert names(simulated(plan, clock)) == [(seed, loss) for seed in (0, 1) for loss in THREE]


def test_runs_at_a_time_finish_sooner(clock):
    plan = Plan(RECIPES, budget=planned(2.5, jobs=3))
    assert len(simulated(plan, clock, jobs=3)) == 6  # two rounds of three
    assert clock.now == 1000 + 120


def test_runs_on_an_accelerator_share_it(clock):
    on_gpu = [dataclasses.replace(recipe, device="cuda") for recipe in RECIPES]
    plan = Plan(on_gpu, budget=planned(2.5, jobs=3, recipes=on_gpu))
    assert not simulated(plan, clock, jobs=3)  # three at once take three minutes
    plan = Plan(on_gpu, budget=planned(3.5, jobs=3, recipes=on_gpu))
    assert len(simulated(plan, clock, jobs=3, seconds_an_epoch=18.0)) == 3


def test_where_one_seed_does_not_fit_another_may(clock):
    few = [dataclasses.replace(recipe, train_fraction=0.1) for recipe in RECIPES[-3:]]
    plan = Plan([*RECIPES[:3], *few], budget=planned(1, recipes=[*RECIPES[:3], *few]))
    assert simulated(plan, clock, seconds_an_epoch=0.6) == few


def test_only_the_runs_of_a_seed_that_are_left_count(clock):
    plan = Plan(RECIPES[1:], budget=planned(2.5))
    assert names(simulated(plan, clock)) == [(0, "label_smoothing"), (0, "large_margin")]


def test_what_has_started_corrects_what_was_measured(clock):
    for real, seeds in ((3.0, 4), (12.0, 1)):  # seconds an epoch, where 6 were measured
        plan = Plan(RECIPES, budget=planned(6.5))
        started = simulated(plan, clock, seconds_an_epoch=real)
        assert {recipe.seed for recipe in started} == set(range(seeds)) and len(started) == 3 * seeds


def test_a_run_that_goes_on_from_a_checkpoint_is_not_taken_for_a_fast_one(clock):
    given = planned(100)
    given.started(RECIPES[0])
    clock.now += 6
    given.epoch(RECIPES[0], 8)  # seven were done before
    assert given._places(RECIPES[1]) == [pytest.approx(12)]  # two epochs are left
    clock.now += 6
    given.epoch(RECIPES[0], 9)
    assert given.seconds(RECIPES[0]) == pytest.approx(60) and given._places(RECIPES[1]) == [pytest.approx(6)]


def test_a_process_starts_once(clock):
    given = planned(3.6, jobs=1, start=30.0)  # half a minute, and three runs
    plan = Plan(RECIPES, budget=given)
    assert len(simulated(plan, clock)) == 3
    assert not simulated(Plan(RECIPES, budget=planned(3.4, start=30.0)), clock)


def test_a_run_of_another_process_is_not_waited_for_beyond_the_time(clock):
    short, long = RECIPES[0], dataclasses.replace(RECIPES[3], epochs=1000)
    plan = Plan([short, long], budget=planned(3, recipes=[short, long]))
    for _ in range(60):  # asked for every two seconds, among runs that do not fit
        assert plan.unfinished and plan.take() == short
        plan.ended(short, Outcome("held"))
        clock.now += 2
    clock.now += 5  # now it does not fit any more either
    assert plan.take() is None and not plan.unfinished


def test_a_run_that_failed_is_tried_again_only_if_it_fits(clock):
    plan = Plan(RECIPES[:3], budget=planned(3.5))
    first = plan.take()
    clock.now += 50
    plan.ended(first, Outcome("failed", "broke"))
    assert names(simulated(plan, clock)) == [(0, "label_smoothing"), (0, "large_margin")]
    assert clock.now == 1000 + 170 and plan.reasons


def test_runs_of_the_same_cost_have_one_key():
    one = RECIPES[0]
    for name, value in {"seed": 7, "loss": "large_margin", "label_noise": 0.3, "epochs": 3, "learning_rate": 1.0}.items():
        assert cost_key(dataclasses.replace(one, **{name: value})) == cost_key(one)
    for name, value in {"network": "layer13", "precision": "bfloat16", "batch_size": 7, "device": "cuda", "width": 0.5}.items():
        assert cost_key(dataclasses.replace(one, **{name: value})) != cost_key(one)
    assert dataclasses.replace(one, train_fraction=0.5, validation_fraction=0.2).work == pytest.approx(0.4 * one.work)


# the queue, the commands


class Charged(Budget):
    """A budget that is charged what a run was measured to take, however short it is in a test."""

    def ended(self, recipe: Planned, done: bool) -> None:
        super().ended(recipe, done)
        self.deadline -= self.seconds(recipe)


def test_a_queue_does_what_fits_and_says_what_is_left(tmp_path):
    given = Charged(1, measure=lambda *_: Cost(0.0, 14.0))  # 14 s a run: three of them in a minute, not six
    records = run_all(ONE_EPOCH, tmp_path, 1, lambda *_: None, work="lab_work:finish", budget=given)
    assert [record.recipe.seed for record in records] == [0, 0, 0]
    console = Console(record=True, width=200)
    say_what_is_left(ONE_EPOCH, tmp_path, given, console)
    said = console.export_text()
    assert "9 of 12 runs left (seeds 1 2 3)" in said and "about 2.1 min." in said
    again = Budget(10, measure=lambda *_: Cost(0.0, 19.0))
    assert len(run_all(ONE_EPOCH, tmp_path, 1, lambda *_: None, work="lab_work:finish", budget=again)) == 12


def test_where_nothing_fits_the_command_says_how_long_it_takes(tmp_path):
    given = Budget(0.5, measure=lambda *_: Cost(0.0, 60.0))
    assert run_all(RECIPES, tmp_path, 2, lambda *_: None, work="lab_work:finish", budget=given) == []
    with pytest.raises(LabError, match=r"--minutes 0.5: 12 of 12 runs left .*about 1.0 h"):
        say_what_is_left(RECIPES, tmp_path, given, Console(quiet=True))


def test_a_failed_run_is_still_an_error(tmp_path):
    with pytest.raises(LabError, match="1 of 3 runs could not be done"):
        seeds = [Recipe(loss="softmax", seed=seed, epochs=2) for seed in range(3)]
        run_all(seeds, tmp_path, 1, lambda *_: None, work="lab_work:fails", budget=Budget(10, measure=lambda *_: Cost(0.0, 0.0)))


def small_comparison(**changes):
    settings = {"losses": ("softmax", "large_margin"), "seeds": (0, 1), "epochs": 1, "train_fraction": 0.4}
    return Comparison(**settings | changes)


def test_a_comparison_within_minutes_reports_what_is_done_and_goes_on(tmp_path, capsys):
    def within(minutes, seconds):
        given = Charged(minutes, measure=lambda *_: Cost(0.0, seconds / 0.4))
        return compare.compare(small_comparison(), tmp_path, 1, Console(width=300), budget=given)

    with pytest.raises(LabError, match="4 of 4 runs left"):
        within(1, 31.0)
    assert [row.n for row in within(1, 20.0)] == [1, 1]
    assert "2 of 4 runs left (seed 1)" in capsys.readouterr().out
    assert [row.n for row in within(1, 0.1)] == [2, 2]
    assert "left" not in capsys.readouterr().out


def test_a_choice_of_lam_within_minutes_stops_before_the_test_set(tmp_path):
    given = Charged(1, measure=lambda *_: Cost(0.0, 20.0 / 0.32))  # two validating runs of four
    with pytest.raises(LabError, match="no run of its last comparison is finished yet"):
        compare.compare(small_comparison(lam=(0.1, 0.3)), tmp_path, 1, Console(quiet=True), budget=given)
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 2
    enough = Budget(1, measure=lambda *_: Cost(0.0, 0.01))
    rows = compare.compare(small_comparison(lam=(0.1, 0.3)), tmp_path, 1, Console(quiet=True), budget=enough)
    assert [row.n for row in rows] == [2, 2]


def test_a_machine_measures_itself():
    cost = budget.measured_cost(Recipe(loss="large_margin", seed=0, lam=0.3, epochs=1), Path("runs"), patience=120.0)
    assert 0 < cost.of_a_pass < cost.start


def test_a_measurement_needs_no_human_labels():
    """They are of all training images, and it takes a few."""
    human = Recipe(loss="softmax", seed=0, epochs=1, label_noise=0.4, noise_kind="human")
    of_a_pass, of_the_measurement = budget._measured_pass(human, Path("runs"), graph=True)
    assert 0 < of_the_measurement < of_a_pass


def test_what_cannot_be_measured_is_told():
    unknown = Recipe(loss="softmax", seed=0, data="/nosuch")
    with pytest.raises(LabError, match=r"could not measure how long .* no such folder"):
        budget.measured_cost(unknown, Path("runs"), patience=120.0)
    assert budget.measured_cost(unknown, Path("runs"), patience=0.0).of_a_pass == float("inf")


def dies(*_: object) -> None:
    os._exit(3)


def test_a_measurement_whose_process_dies_is_told_at_once(monkeypatch):
    monkeypatch.setattr(budget, "_measure_a_pass", dies)
    with pytest.raises(LabError, match=r"the process that measures how long .* takes died"):
        budget.measured_cost(RECIPES[0], Path("runs"), patience=120.0)


def test_many_refused_runs_are_looked_through_at_once(clock, monkeypatch):
    many = [dataclasses.replace(recipe, seed=10 * recipe.seed + more, epochs=10_000) for recipe in RECIPES for more in range(10)]
    given = planned(1, recipes=many)
    asked: list[Recipe] = []

    def seconds(recipe: Recipe) -> float:
        asked.append(recipe)
        return 1e9

    monkeypatch.setattr(given, "seconds", seconds)
    assert given.choose(many) is None and len(asked) == len(many)  # each once


@pytest.mark.parametrize("command", [["compare"], ["reproduce", "table2"]])
def test_minutes_are_for_runs_of_this_machine(command, capsys):
    assert cli.main([*command, "--minutes", "5", "--executor", "ray"]) == 2
    assert "--minutes is for --executor local" in capsys.readouterr().err
    assert cli.main([*command, "--minutes", "0"]) == 2


# the device and the number of runs at a time


def test_the_device_is_a_gpu_where_torch_sees_one(monkeypatch, tmp_path):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(environment.torch.cuda, "is_available", lambda there=there: there)
        for of in (compare.device_of, reproduce.device_of, single.device_of):
            assert of(tmp_path / "new") == device


def test_runs_go_on_on_the_device_where_they_began(monkeypatch, tmp_path):
    for name in "ct":
        (tmp_path / name).mkdir()
    marker = {"largemargin": "compare", "comparison": vars(Comparison(device="cpu"))}
    (tmp_path / "c" / "compare.json").write_text(json.dumps(marker))
    (tmp_path / "t" / "recipe.json").write_text(json.dumps(Recipe("softmax", 0, device="cpu").to_dict()))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "reproduce.json").write_text('{"largemargin": "reproduce", "overrides": {}}')
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "reproduce.json").write_text('{"largemargin": "reproduce", "overrides": {"device": "cuda:1"}}')
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: True)
    assert compare.device_of(tmp_path / "c") == "cpu"
    assert single.device_of(tmp_path / "t") == "cpu"
    assert reproduce.device_of(tmp_path / "r") == "cpu" and reproduce.device_of(tmp_path / "g") == "cuda:1"


def test_a_gpu_does_a_few_runs_at_a_time(monkeypatch):
    for cores, memory, jobs in ((16, 80, 3), (4, 80, 2), (1, 80, 1), (16, 24, 2), (16, 8, 1)):
        monkeypatch.setattr(environment.torch.cuda, "mem_get_info", lambda _, memory=memory: (memory * 2**30, 80 * 2**30))
        monkeypatch.setattr(queue, "num_cores", lambda cores=cores: cores)
        assert queue.default_jobs("cuda", False, on_cpu=2) == jobs
        assert queue.default_jobs("cuda", True, on_cpu=2) == 1  # its workers need the cores
        assert queue.default_jobs("cpu", False, on_cpu=2) == 2


def test_the_help_names_the_default_of_a_device():
    assert "cuda where torch sees a GPU" in options.DEVICE_HELP
