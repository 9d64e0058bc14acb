"""Schedules: the authors' numbers, and a count that goes on where it was."""

import copy

import mpmath
import pytest
import torch

from combinations import every
from largemargin.schedules import AnnealedLambda, GradualWeight, Schedule, SteppedAlpha
from measure import compiles

MAKERS = {
    "annealed": lambda: AnnealedLambda.for_steps(20),
    "stepped": lambda: SteppedAlpha(every=3),
    "gradual": lambda: GradualWeight(7, 2.0, -1.0),
}
each_schedule = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def value_at(schedule: Schedule, step: int) -> float:
    """The value of training step ``step``."""
    schedule.step.fill_(step - 1)
    return float(schedule())


# the authors' numbers


@every(
    "preset, values",
    [
        (AnnealedLambda.mnist, {1000: 421, 5000: 16.2, 10_000: 0.406, 12_000: 0.103, 18_000: 0.0023}),
        (AnnealedLambda.cifar10, {1000: 410, 5000: 13.7, 10_000: 0.273, 12_000: 0.0625, 18_000: 0.00098}),
        (AnnealedLambda.cifar10_augmented, {1000: 639, 5000: 111, 10_000: 13.7, 12_000: 6.1, 18_000: 0.58}),
    ],
)
def test_presets_have_the_values_of_the_authors_runs(preset, values):
    for step, value in values.items():
        assert value_at(preset(), step) == pytest.approx(value, rel=0.025)  # to the digits they are given with


def test_sphereface_stays_at_5():
    assert value_at(AnnealedLambda.sphereface(), 1) == pytest.approx(1000 / 1.12, rel=1e-12)
    assert value_at(AnnealedLambda.sphereface(), 10**6) == 5


@every("step", [1, 2, 100, 12_345, 10**7])
@every("options", [(1000, 2.5e-5, 35, 0.0), (1000, 0.12, 1, 5.0), (7, 3.0, 0.5, 0.1), (0, 1.0, 1, 2.0), (3, 0, 9, 0)])
def test_lambda_is_its_formula(options, step):
    base, gamma, power, lambda_min = map(mpmath.mpf, options)
    truth = max(lambda_min, base * (1 + gamma * step) ** -power)
    assert value_at(AnnealedLambda(*options), step) == pytest.approx(float(truth), rel=1e-12)


@every("power", [1, 35, 45])
@every("base", [1000, 1, 0.001])
@every("num_steps", [1, 10, 30_000, 10**7])
def test_lambda_is_gone_at_the_end_of_the_run_and_no_sooner(num_steps, base, power):
    schedule = AnnealedLambda.for_steps(num_steps, base=base, power=power)
    assert min(base, 1e-2) * (1 - 1e-6) <= value_at(schedule, num_steps) <= 1e-2
    assert value_at(AnnealedLambda.for_steps(num_steps, base=base, power=power, lambda_min=0.5), num_steps) == 0.5


def test_alpha_is_the_authors_and_keeps_to_parts_of_the_run():
    at = {1: 0.1, 5000: 0.1, 5001: 0.2, 10_000: 0.2, 10_001: 0.3, 120_000: 0.3}
    for step, value in at.items():
        assert value_at(SteppedAlpha(), step) == pytest.approx(value, rel=1e-12)
        assert value_at(SteppedAlpha.for_steps(120_000), step) == pytest.approx(value, rel=1e-12)
    assert SteppedAlpha.for_steps(2400).every == 100 and SteppedAlpha.for_steps(1).every == 1
    assert value_at(SteppedAlpha(every=1), 10**9) == 0.3  # and no overflow


def test_gradual_weight_is_straight():
    schedule = GradualWeight(10, 1.0, 3.0)
    assert [float(schedule()) for _ in range(12)] == pytest.approx([1 + 0.2 * step for step in range(11)] + [3.0])


# the count


@each_schedule
def test_only_training_advances_and_eval_shows_the_last_value(make):
    schedule = make()
    first = float(schedule.eval()())
    assert schedule.step == 0 and float(schedule.train()()) == first
    second = float(schedule())
    assert schedule.step == 2 and float(schedule.eval()()) == second == float(schedule()) and schedule.step == 2
    schedule.reset()
    assert float(schedule.train()()) == first


@each_schedule
def test_a_resumed_run_has_the_same_values(make, tmp_path):
    schedule, resumed = make(), make()
    for _ in range(4):
        schedule()
    torch.save(schedule.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    duplicate = copy.deepcopy(schedule)
    values = [[float(each()) for _ in range(8)] for each in (schedule, resumed, duplicate)]
    assert values[0] == values[1] == values[2] and len(set(values[0])) > 1


@each_schedule
def test_a_value_does_not_change_when_the_count_does(make):
    schedule = make()
    value = schedule()
    before = float(value)
    for _ in range(10):
        schedule()
    assert float(value) == before and value.dim() == 0 and not value.requires_grad
    assert (value * torch.ones(3)).dtype == torch.float32 and (value * torch.ones(3).half()).dtype == torch.float16


@compiles
@each_schedule
def test_compiled_code_counts_without_compiling_again(make):
    torch._dynamo.reset()
    schedule, expected = make(), make()
    compiled = torch.compile(schedule, backend="aot_eager", fullgraph=True)
    with torch.compiler.set_stance("default"):
        assert float(compiled()) == pytest.approx(float(expected()), rel=1e-12)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(10):
            assert float(compiled()) == pytest.approx(float(expected()), rel=1e-12)
    assert schedule.step == 11


@every(
    "make, error, words",
    [
        (lambda: AnnealedLambda(-1, 1, 1), ValueError, "base must be finite and at least 0, got -1"),
        (lambda: AnnealedLambda(1, "1", 1), TypeError, "gamma must be a Python number"),
        (lambda: AnnealedLambda.for_steps(0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda: AnnealedLambda.for_steps(10, power=0), ValueError, "power must be above 0, got 0"),
        (lambda: SteppedAlpha(start=0), ValueError, "start must be above 0, got 0"),
        (lambda: SteppedAlpha(factor=0.5), ValueError, "factor must be finite"),
        (lambda: SteppedAlpha(every=1.5), TypeError, "every must be an int"),
        (lambda: GradualWeight(3, float("nan")), ValueError, "start must be finite"),
    ],
)
def test_mistakes_name_the_argument(make, error, words):
    with pytest.raises(error, match=words):
        make()
