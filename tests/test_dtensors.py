"""DTensor logits: every loss, the statistics and every metric are those of the full tensor, wherever its rows and classes are."""

from typing import Any

import pytest

import on_ranks_dtensors
from combinations import covering

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
LAYOUTS = [((4,), ("classes",)), ((4,), ("rows",)), ((4,), ("",)), ((2, 2), ("rows", "classes")), ((2, 2), ("classes", "inner"))]
each_layout = pytest.mark.parametrize(("mesh", "places"), LAYOUTS, ids=str)


@each_layout
@pytest.mark.parametrize("name", on_ranks_dtensors.FUNCTIONS)
def test_hinges_equal_those_of_the_full_tensor(ranks, name, mesh, places):
    settings: tuple[dict[str, Any], ...] = ({}, {"weighted": True, "margin": 0.5})
    given = [
        (name, mesh, places, num_classes, {**options, "reduction": reduction})
        for num_classes, reduction, options in covering(2, num_classes=(9, 3), reduction=("none", "sum", "mean"), options=settings)
    ]
    ranks.assert_on_each(4, on_ranks_dtensors.hinge_equals_whole, given)


@each_layout
def test_other_row_losses_equal_those_of_the_full_tensor(ranks, mesh, places):
    ranks.assert_on(4, on_ranks_dtensors.row_losses_equal_whole, mesh, places)


@each_layout
def test_statistics_equal_those_of_the_full_tensor(ranks, mesh, places):
    for num_classes in (9, 3):
        ranks.assert_on(4, on_ranks_dtensors.statistics_equal_whole, mesh, places, num_classes)


@pytest.mark.slow
@each_layout
def test_metrics_equal_those_of_the_full_tensor(ranks, mesh, places):
    ranks.assert_on(4, on_ranks_dtensors.metrics_equal_whole, mesh, places)


def test_a_class_parallel_layer_names_features_that_it_cannot_take(ranks):
    ranks.assert_on(2, on_ranks_dtensors.a_class_parallel_layer_names_features_that_it_cannot_take)


def test_logits_of_a_class_parallel_layer_go_everywhere(ranks):
    ranks.assert_on(3, on_ranks_dtensors.logits_of_a_class_parallel_layer_go_everywhere)


def test_a_plain_input_wants_a_plain_target(ranks):
    ranks.assert_on(4, on_ranks_dtensors.a_plain_input_wants_a_plain_target)


def test_what_meets_a_plain_tensor_is_plain(ranks):
    ranks.assert_on(4, on_ranks_dtensors.what_meets_a_plain_tensor_is_plain)


@pytest.mark.parametrize(
    ("names", "mesh", "classes", "rows"),
    [
        (on_ranks_dtensors.KINDS, (4,), ("rows",), ("",)),
        (on_ranks_dtensors.SPLIT, (4,), ("rows",), ("rows",)),
        (on_ranks_dtensors.KINDS, (2, 2), ("", "rows"), ("rows", "")),
        pytest.param(on_ranks_dtensors.SPLIT, (2, 2), ("", "rows"), ("rows", ""), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_heads_whose_classes_are_split_equal_the_whole(ranks, names, mesh, classes, rows):
    ranks.assert_on(4, on_ranks_dtensors.heads_equal_whole, names, mesh, classes, rows)


def test_centers_move_where_they_are_whole(ranks):
    ranks.assert_on(3, on_ranks_dtensors.centers_move_where_they_are_whole)


def test_the_penalty_equals_that_of_the_full_tensor(ranks):
    ranks.assert_on(4, on_ranks_dtensors.penalty_equals_whole)
