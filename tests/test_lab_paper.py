"""The paper as data: what was printed is there, and every cell is a recipe."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from combinations import every
from largemargin.lab.errors import LabError
from largemargin.lab.models import NAMES as NETWORKS
from largemargin.lab.paper import cells as paper
from largemargin.lab.paper.cells import Number, cells
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe

# typed from the paper: (row, column) and what stands there
PRINTED = {
    "table1": {
        ("D(u‖q)", "0.1"): (27.99, 0.18),
        ("D(u‖q)", "0.7"): (26.77, 0.35),
        ("D(q‖u)", "0.2"): (28.52, 0.44),
        ("D(q‖u)", "0.9"): (26.98, 0.09),
        ("symmetric D̃(q)", "0.3"): (27.27, 0.15),
        ("symmetric D̃(q)", "0.6"): (26.73, 0.15),
    },
    "table2": {
        ("softmax", ""): (28.62, 0.24),
        ("super-symmetry", ""): (28.67, 0.46),
        ("LSR λ=0.01", ""): (28.80, 0.23),
        ("LSR λ=0.05", ""): (28.51, 0.22),
        ("LSR λ=0.1", ""): (28.48, 0.13),
        ("LSR λ=0.3", ""): (28.65, 0.25),
        ("ours λ=0.3", ""): (27.27, 0.15),
    },
    "table3a": {
        ("softmax", "0.9"): (29.66, 0.21),
        ("ours λ=0.3", "0.7"): (31.35, 0.47),
        ("ours λ=0.5", "0.9"): (28.09, 0.03),
        ("ours λ=1", "0.5"): (35.49, 0.15),
    },
    "table3b": {
        ("softmax", "0.4"): (43.65, 0.81),
        ("ours λ=0.3", "0.3"): (38.23, 0.26),
        ("ours λ=0.5", "0.5"): (46.41, 0.09),
        ("ours λ=1", "0.1"): (30.42, 0.20),
    },
    "table4": {
        ("softmax", "CIFAR-10 WRN-28-10"): (4.73, 0.07),
        ("LSM", "CIFAR-10 WRN-28-10"): (4.49, 0.13),
        ("LGM", "SVHN WRN-28-10"): (2.65, 0.07),
        ("ours λ=0.3", "SVHN WRN-28-10"): (2.67, 0.03),
        ("hinge (14)", "ImageNet VGG-16"): (46.58, None),
        ("modified (15)", "ImageNet VGG-16-mod"): (24.92, None),
        ("LSM", "ImageNet MobileNet"): (39.35, None),
        ("modified (15) + ours λ=0.3", "ImageNet VGG-16-mod"): (24.37, None),
        ("modified (15) + ours λ=0.3", "ImageNet ResNeXt-50"): (22.00, None),
        ("softmax", "Places-365 VGG-16-mod"): (45.02, None),
        ("ours λ=0.3", "Places-365 VGG-16-mod"): (44.61, None),
    },
}
COUNTS = {"table1": 28, "table2": 7, "table3a": 20, "table3b": 20, "human": 5, "table4": 36, "fig3": 3, "sec3": 8, "port": 14, "study": 8}
TABLES = list(COUNTS)


@pytest.mark.parametrize("table", PRINTED)
def test_the_printed_numbers_are_there(table):
    found = {(cell.row, cell.column): cell.paper for cell in cells(table)}
    for at, (mean, std) in PRINTED[table].items():
        assert found[at] == Number(mean, std), at


@every("table, count", COUNTS.items())
def test_no_cell_is_missing_or_twice(table, count):
    assert len({(cell.row, cell.column) for cell in cells(table)}) == len(cells(table)) == count


def test_only_lgm_on_vgg_and_what_the_paper_does_not_print_has_no_number():
    missing = {(cell.row, cell.column) for table in PRINTED for cell in cells(table) if cell.paper is None}
    assert missing == {("LGM", "ImageNet VGG-16"), ("LGM", "ImageNet VGG-16-mod")}
    assert all("collapsed" in cell.note for cell in cells("table4") if cell.paper is None)


def test_ours_is_better_than_softmax_wherever_both_are_printed():
    for table in ("table3", "table4", "port"):
        softmax = {cell.column: cell for cell in cells(table) if cell.baseline}
        for cell in cells(table):
            if cell.row.startswith("ours") and cell.paper is not None and softmax[cell.column].paper is not None:
                assert cell.paper.mean < softmax[cell.column].paper.mean, cell.name
            if cell.row.startswith("ours") and cell.port is not None:
                assert cell.port.mean < softmax[cell.column].port.mean, cell.name


def test_errors_grow_with_less_data_and_with_more_noise():
    for table, sign in (("table3a", -1), ("table3b", 1)):
        for row in paper.TABLE_3_LOSSES:
            means = [cell.paper.mean for cell in sorted(cells(table), key=lambda cell: sign * float(cell.column)) if cell.row == row]
            assert means == sorted(means) and len(set(means)) == 5


def test_the_numbers_of_the_port_stand_beside_the_same_setting():
    assert {cell.row: cell.port for cell in cells("table2") if cell.port} == {
        "softmax": Number(29.42, 0.19),
        "ours λ=0.3": Number(27.61, 0.09),
    }
    ports = {(cell.row, cell.column): cell.port for cell in cells("table4") if cell.port}
    assert ports.pop(("ours λ=0.3", "ImageNet VGG-16-mod")) == Number(22.09)
    assert len(ports) == 5 and {column for _, column in ports} == {"ImageNet VGG-16", "ImageNet VGG-16-mod", "ImageNet ResNeXt-50"}
    by_column = {(cell.row, cell.column): cell for cell in cells("port")}
    assert by_column["softmax", "CIFAR-10 13-layer"].port == Number(8.45, 0.27)
    assert by_column["softmax", "CIFAR-10 13-layer"].paper is None
    assert by_column["softmax", "CIFAR-100 13-layer"].paper == Number(28.62, 0.24)


def test_names_are_unique_and_plain():
    names = [cell.name for target in paper.TARGETS if target != "table3" for cell in cells(target)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9./-]+", name) for name in names)
    assert {"table2/softmax", "table2/lsr-0.01", "table1/d-u-q/0.1", "table3b/ours-1/0.5"} <= set(names)


@every("target", paper.TARGETS)
def test_every_cell_is_a_recipe_of_its_own(target):
    recipes = [recipe for cell in cells(target) for recipe in cell.recipes((0, 1, 2), data_digest=cell.settings["data"])]
    assert len({recipe.id for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        assert recipe.network in NETWORKS or recipe.network.startswith("timm:")
        assert all(getattr(recipe, name) is not None for name in LOSSES[recipe.loss])


@every("table", TABLES)
def test_cells_of_a_table_differ_from_their_baseline_in_the_loss_alone(table):
    fields = {"loss", "divergence", *(name for settings in LOSSES.values() for name in settings)}
    baselines = {cell.column: cell for cell in cells(table) if cell.baseline}
    assert set(baselines) == ({""} if table == "table1" else {cell.column for cell in cells(table)})
    for cell in cells(table):
        baseline = baselines["" if table == "table1" else cell.column]
        one, other = (each.recipes((0,))[0].to_dict() for each in (cell, baseline))
        assert {name for name in one if one[name] != other[name]} <= fields


def test_the_baseline_of_table_1_is_the_softmax_of_table_2():
    (one,), (other,) = ([cell for cell in cells(table) if cell.baseline] for table in ("table1", "table2"))
    assert (one.paper, one.port, [run.id for run in one.recipes()]) == (other.paper, other.port, [run.id for run in other.recipes()])
    assert "Table 2" in one.note


def test_the_same_setting_in_two_tables_is_one_run():
    ours = [
        next(cell for cell in cells(table) if cell.name == name).recipes()
        for table, name in (
            ("table1", "table1/symmetric-d-q/0.3"),
            ("table2", "table2/ours-0.3"),
            ("fig3", "fig3/ours-0.3"),
            ("sec3", "sec3/ours-0.3"),
            ("port", "port/ours-0.3/cifar-100-13-layer"),
            ("study", "study/ours-0.3/clean"),
        )
    ]
    assert all([recipe.id for recipe in recipes] == [recipe.id for recipe in ours[0]] for recipes in ours)


def test_table_1_has_its_three_divergences():
    regularized = [cell for cell in cells("table1") if not cell.baseline]
    found = {(cell.row, cell.recipes((0,))[0].divergence) for cell in regularized}
    assert found == {("D(u‖q)", "kl_uq"), ("D(q‖u)", "kl_qu"), ("symmetric D̃(q)", None)}
    assert all(float(cell.column) == cell.settings["lam"] for cell in regularized)


def test_the_cifar_recipe_is_that_of_section_4():
    learning_rates = pytest.importorskip("largemargin.lab.run.optimizer").learning_rates
    for table in ("table1", "table2", "table3", "fig3", "sec3", "study"):
        for cell in cells(table):
            recipe = cell.recipes((0,))[0]
            assert (recipe.data, recipe.network, recipe.batch_size, recipe.momentum, recipe.weight_decay) == (
                "cifar100",
                "layer13",
                128,
                0.9,
                1e-4,
            )
            assert (recipe.crop_padding, recipe.crop_fill, recipe.flip, recipe.decay_all) == (4, "mean", True, True)
    np.testing.assert_allclose(learning_rates(recipe), np.logspace(-1, -4, 50), rtol=1e-12)


def test_the_imagenet_recipe_is_that_of_the_port():
    learning_rates = pytest.importorskip("largemargin.lab.run.optimizer").learning_rates
    large = [cell for cell in cells("table4") if cell.settings["data"] in paper.LARGE_DATA]
    assert len(large) == 24
    for cell in large:
        (recipe,) = cell.recipes()
        assert (recipe.batch_size, recipe.augmentation, recipe.image_size) == (256, "inception", 224)
        np.testing.assert_allclose(learning_rates(recipe), np.repeat([1e-1, 1e-2, 1e-3, 1e-4], 30), rtol=1e-12)


def test_the_reduced_scale_multiplies_shares_and_is_narrow_where_the_network_can_be():
    reduced = paper.SCALES["reduced"]
    for cell in cells("table3a"):
        (recipe,) = cell.recipes((0,), reduced)
        assert recipe.train_fraction == pytest.approx(0.2 * float(cell.column))
        assert (recipe.width, recipe.epochs) == (0.25, 15)
    wide = next(cell for cell in cells("table4") if "svhn" in cell.name)
    assert (wide.recipes((0,), reduced)[0].width, wide.recipes((0,), reduced)[0].train_fraction) == (1.0, 0.2)
    with pytest.raises(LabError, match="--scale reduced"):
        cells("table4")[-1].recipes((0,), reduced)


def test_the_narrow_network_has_no_room_for_a_super_symmetric_classifier():
    lacking = [cell.name for cell in cells("table2") if cell.lacks(paper.SCALES["reduced"])]
    assert lacking == ["table2/super-symmetry"]
    assert not any(cell.lacks(paper.SCALES["full"]) for table in TABLES for cell in cells(table))


def test_what_is_fixed_has_the_last_word():
    cell = cells("table3a")[0]
    (recipe,) = cell.recipes((7,), paper.SCALES["reduced"], epochs=2, device="cuda")
    assert (recipe.seed, recipe.epochs, recipe.device) == (7, 2, "cuda")


@every("table", TABLES)
def test_every_cell_says_what_it_assumes(table):
    for cell in cells(table):
        said = paper.assumptions(cell)
        assert len(said) == len(set(said)) >= 3
        assert all(sentence.endswith(".") and "\n" not in sentence for sentence in said)


def test_wrong_labels_are_an_assumption_in_every_table_that_has_them():
    (moved,) = paper.ASSUMPTIONS["table3b"]
    for table in TABLES:
        for cell in cells(table):
            assert (moved in paper.assumptions(cell)) == (bool(cell.settings.get("label_noise")) and table != "human")


def test_human_labels_are_beyond_the_paper():
    of_table_3b = {cell.row: cell.recipes((0,))[0] for cell in cells("table3b") if cell.column == "0.4"}
    for cell in cells("human"):
        (recipe,) = cell.recipes((0,))
        assert (recipe.label_noise, recipe.noise_kind) == (0.402, "human")
        assert cell.paper is cell.port is None and cell.note == "not in the paper"
        assert any(sentence.startswith("Beyond the paper: ") for sentence in paper.assumptions(cell))
        if cell.row in of_table_3b:  # label smoothing is not
            assert dataclasses.replace(recipe, label_noise=0.4, noise_kind=None) == of_table_3b[cell.row]
    assert of_table_3b.keys() < {cell.row for cell in cells("human")}


def test_a_sub_sample_is_an_assumption_wherever_one_is_drawn():
    (drawn,) = paper.ASSUMPTIONS["sub-sample"]
    for table in TABLES:
        for cell in cells(table):
            for scale in paper.SCALES.values():
                if not cell.lacks(scale):
                    assert (drawn in paper.assumptions(cell, scale)) == (cell.recipes((0,), scale)[0].train_fraction < 1)


def test_what_the_port_leaves_open_is_said_with_each_of_its_numbers():
    (said,) = paper.ASSUMPTIONS["port"]
    for table in TABLES:
        for cell in cells(table):
            assert (said in paper.assumptions(cell)) == (cell.port is not None or table == "port")


def test_the_port_has_one_number_for_one_recipe():
    numbers: dict[Any, Any] = {}
    for table in TABLES:
        for cell in cells(table):
            if cell.paper is not None or table == "port":
                (recipe,) = cell.recipes((0,), paper.SCALES["full"], data_digest=cell.settings["data"])
                numbers.setdefault(recipe.id, set()).add(cell.port)
    assert all(len(found) == 1 for found in numbers.values())


def test_every_assumption_is_of_some_cell():
    said = {sentence for table in TABLES for cell in cells(table) for sentence in paper.assumptions(cell)}
    assert said == {sentence for sentences in paper.ASSUMPTIONS.values() for sentence in sentences}


def test_settings_are_fields_of_a_recipe():
    names = {field.name for field in dataclasses.fields(Recipe)}
    for table in TABLES:
        for cell in cells(table):
            assert cell.settings.keys() <= names - {"seed"}
    assert all(scale.changes.keys() <= names for scale in paper.SCALES.values())
