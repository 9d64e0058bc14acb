"""The loops and covering arrays that other tests run over leave nothing out."""

from itertools import combinations, product

import pytest
import torch

from combinations import covering, every

FACTORS = {"dtype": ["a", "b", "c"], "shape": [1, 2, 3, 4], "weighted": [False, True], "reduction": ["none", "sum", "mean"]}


@pytest.mark.parametrize("strength", [2, 3])
def test_any_values_of_so_many_factors_meet_in_some_case(strength):
    cases = covering(strength=strength, **FACTORS)
    for columns in combinations(range(len(FACTORS)), strength):
        wanted = set(product(*(list(FACTORS.values())[column] for column in columns)))
        assert {tuple(case[column] for column in columns) for case in cases} == wanted
    assert len(cases) < 72


def test_a_loop_runs_over_every_pair_with_the_same_random_numbers(rng):
    met = []

    @every("one", [1, 2])
    @every("two, three", [("a", None), ("b", None), ("c", None)])
    def draw(one, two, three, rng):
        met.append((one, two, torch.rand(1, generator=rng).item()))

    draw(rng=rng)
    assert [case[:2] for case in met] == list(product([1, 2], "abc"))
    assert len({case[2] for case in met}) == 1


def test_a_loop_names_the_case_that_failed():
    @every("one", [1, 2])
    @every("two", [int, str])
    def law(one, two):
        assert (one, two) != (2, str)

    with pytest.raises(AssertionError) as caught:
        law()
    assert caught.value.__notes__ == ["with two=str", "with one=2"]


def test_a_loop_is_skipped_where_all_its_cases_are():
    met = []

    @every("one", [1, 2, 3])
    def at_least(one, least):
        if one < least:
            pytest.skip("too small")
        met.append(one)

    at_least(least=2)
    assert met == [2, 3]
    with pytest.raises(pytest.skip.Exception, match="too small"):
        at_least(least=4)
