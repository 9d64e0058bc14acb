"""Features and tables: read, prepared on the training samples alone, trained on, and used on new samples."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")
pytest.importorskip("jsonargparse", reason="needs jsonargparse, which is not installed, for the command line")

from sklearn.datasets import load_digits, load_wine
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from largemargin.lab import cli, data, load
from largemargin.lab.data.features import Column, FeatureSet
from largemargin.lab.data.raw_table import read_table
from largemargin.lab.errors import LabError
from largemargin.lab.models import OF_FEATURES, build, check_input
from largemargin.lab.run.features import InMemoryFeatures
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.standard import Standard, standard_of
from largemargin.lab.run.train import train

CPU = torch.device("cpu")
WINE = load_wine()
pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_features")]  # one worker makes its runs


def written(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """scikit-learn's wines as a table, with a column of words, missing cells and a constant column."""
    generator = np.random.default_rng(0)
    rows = []
    for values, label in zip(WINE.data, WINE.target, strict=True):
        cells = ["" if generator.random() < 0.03 else f"{value:g}" for value in values]
        rows.append([*cells, generator.choice(["oak", "steel", "NA"]), 5, WINE.target_names[label]])
    return written(tmp_path_factory.mktemp("wine") / "wine.csv", [*WINE.feature_names, "barrel", "batch", "cultivar"], rows)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    bunch = load_digits()
    np.savez(path, x=bunch.data.astype(np.float32), y=bunch.target)
    return str(path)


def few_rows(tmp_path, header="height,colour,label", rows=()):
    rows = rows or [[f"{i}.5", "red" if i % 2 else "blue", "cat" if i % 3 else "dog"] for i in range(30)]
    return written(tmp_path / "table.csv", header.split(","), rows)


def of_recipe(path, **more):
    return Recipe("large_margin", 0, data=path, network="mlp", **({"lam": 0.3, "epochs": 2} | more))


# reading


def test_numbers_with_two_dimensions_are_features(digits):
    found, bunch = data.load(digits, "data", 32), load_digits()
    assert isinstance(found, FeatureSet) and data.holds_features(digits)
    assert (len(found.train_labels), len(found.test_labels), found.num_features) == (1437, 360, 64)
    rows = torch.cat([found.train_features, found.test_features]).numpy()
    assert sorted(map(tuple, rows)) == sorted(map(tuple, bunch.data.astype(np.float32)))
    shares = torch.bincount(found.test_labels) / torch.bincount(found.train_labels)
    assert (abs(shares - 0.25) < 0.03).all()  # a fifth of each class


def test_a_split_and_both_forms_of_keys_are_taken(tmp_path):
    x, y = np.arange(12.0).reshape(6, 2), np.array(["a", "b", "a", "b", "a", "b"])
    np.savez(tmp_path / "split.npz", x=x, y=y, split=["train", "train", "train", "train", "test", "test"])
    np.savez(tmp_path / "parts.npz", train_x=x[:4], train_y=y[:4], test_x=x[4:], test_y=y[4:])
    one, other = (data.load(str(tmp_path / name), "data", 32) for name in ("split.npz", "parts.npz"))
    assert isinstance(one, FeatureSet) and one.digest() == other.digest() and one.classes == ("a", "b")
    assert one.test_features.tolist() == [[8, 9], [10, 11]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_])
def test_every_type_of_number_keeps_its_value(dtype, tmp_path):
    x = np.random.default_rng(0).integers(0, 2 if dtype is np.bool_ else 100, (20, 3)).astype(dtype)
    np.savez(tmp_path / "a.npz", train_x=x, train_y=np.arange(20) % 2, test_x=x, test_y=np.arange(20) % 2)
    found = data.load(str(tmp_path / "a.npz"), "data", 32)
    assert isinstance(found, FeatureSet) and (found.train_features.numpy() == x).all()


def test_the_digest_changes_with_any_value_and_the_path_does_not(digits, tmp_path):
    bunch = load_digits()
    np.savez(tmp_path / "moved.npz", x=bunch.data.astype(np.float32), y=bunch.target)
    bunch.data[7, 20] += 1
    np.savez(tmp_path / "changed.npz", x=bunch.data.astype(np.float32), y=bunch.target)
    digest, moved, changed = (
        data.load(str(path), "data", 32).digest() for path in (digits, tmp_path / "moved.npz", tmp_path / "changed.npz")
    )
    assert digest == moved != changed


def test_images_are_still_images(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20) % 2)
    assert not isinstance(data.load(str(tmp_path / "a.npz"), "data", 32), FeatureSet)
    assert not any(data.holds_features(str(name)) for name in (tmp_path / "a.npz", tmp_path / "none.npz", "digits", tmp_path))


def test_words_become_one_feature_for_each_category_as_in_scikit_learn(tmp_path):
    rows = [[f"{i}", ["red", "blue", "?"][i % 3], "train", i % 2] for i in range(12)] + [["3", "green", "test", 0], ["4", "red", "test", 1]]
    found = data.load(few_rows(tmp_path, "height,colour,split,label", rows), "data", 32)
    assert isinstance(found, FeatureSet)
    colours = np.array([["" if row[1] == "?" else row[1]] for row in rows], dtype=object)
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(colours[:12])
    assert found.columns == (Column("height"), Column("colour", ("", "blue", "red")))
    assert (found.train_features[:, 1:].numpy() == encoder.transform(colours[:12])).all()
    assert (found.test_features[:, 1:].numpy() == encoder.transform(colours[12:])).all()  # green is none of them
    assert found.test_files == ("line 14", "line 15")


@pytest.mark.parametrize("missing", ["", " ", "NA", "None"])
def test_an_empty_cell_among_words_is_a_category_of_its_own(missing, tmp_path):
    rows = [[f"{i}.5", ["red", "blue", missing][i % 3], "train" if i < 9 else "test", "ab"[i % 2]] for i in range(12)]
    found = data.load(few_rows(tmp_path, "height,colour,split,label", rows), "data", 32)
    assert isinstance(found, FeatureSet) and found.columns[1] == Column("colour", ("", "blue", "red"))
    assert found.test_features[:, 1:].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_separators_and_decimal_commas(tmp_path):
    found = []
    for name, separator, point in (("a", ",", "."), ("b", ";", ","), ("c", "\t", ".")):
        lines = [separator.join(("height", "label"))] + [separator.join((f"{i}.5".replace(".", point), "ab"[i % 2])) for i in range(20)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8-sig")
        found.append(data.load(str(tmp_path / f"{name}.csv"), "data", 32).digest())
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("header", "target", "classes", "said"),
    [
        ("height,colour,label", "", ("cat", "dog"), "column label of table.csv (by its name"),
        ("height,Class,last", "", ("blue", "red"), "column Class of table.csv (by its name"),
        ("height,colour,last", "", ("cat", "dog"), "column last of table.csv (the last; --target names another)"),
        ("height,colour,last", "colour", ("blue", "red"), "column colour of table.csv (--target)"),
    ],
)
def test_the_column_of_the_classes_is_found_and_said(header, target, classes, said, tmp_path):
    found = data.load(few_rows(tmp_path, header), "data", 32, target=target)
    assert found.classes == classes and said in found.notes[0]


def test_classes_that_are_whole_numbers_are_in_their_order(tmp_path):
    found = data.load(few_rows(tmp_path, "height,label", [[i, f"{(2, 10, 1)[i % 3]}.0"] for i in range(30)]), "data", 32)
    assert found.classes == ("1", "2", "10")


def test_constant_and_missing_and_counting_columns_are_said(tmp_path):
    rows = [[i, 7, "" if i == 3 else i * i, "ab"[i % 2], "test" if i > 20 else "train"] for i in range(30)]
    notes = " / ".join(data.load(few_rows(tmp_path, "id,batch,height,label,split", rows), "data", 32).notes)
    assert "1 feature of one value in the training set, of no effect: batch" in notes
    assert "warning: column id counts the rows" in notes and "height counts" not in notes
    assert "1 missing number in the training set, in 1 feature, filled with the median" in notes


@pytest.mark.parametrize(("count", "named"), [(5, "c0, c1, c2, c3, c4"), (6, "c0, c1, c2, c3, c4, ...")])
def test_at_most_five_constant_columns_are_named(count, named, tmp_path):
    names = [f"c{i}" for i in range(count)]
    rows = [[7] * count + [i * i, "ab"[i % 2]] for i in range(30)]
    notes = data.load(few_rows(tmp_path, ",".join([*names, "height", "label"]), rows), "data", 32).notes
    assert f"{count} features of one value in the training set, of no effect: {named}" in notes


BAD = {
    "an infinite number": ("height,label", [["1", "a"], ["inf", "b"]], "line 3, column height: got inf, expected a finite number"),
    "a word among numbers": ("height,label", [["1", "a"], ["2", "b"], ["tall", "a"]], "line 4, column height: got 'tall'"),
    "a missing class": ("height,label", [["1", "a"], ["2", ""]], "line 3, column label: the class is missing"),
    "a quantity": ("height,price", [["1", "1.5"], ["2", "2.5"]], "line 2, column price: got 1.5, and a class is a name or a whole number"),
    "no feature": ("label", [["a"], ["b"]], "there is no column beside the class label"),
    "one class": ("height,label", [["1", "a"]] * 10, "found 1 class, need at least 2"),
    "a class of one": ("height,label", [["1", "a"]] * 10 + [["1", "b"]], "a fifth of every class cannot be held out"),
    "two classes": ("height,label,target", [["1", "a", "b"]], "the columns label and target may both be the class; name one with --target"),
    "no name": ("height,,label", [["1", "2", "a"]], "column 2 has no name, as the index that pandas writes"),
    "one name twice": ("height,height,label", [["1", "2", "a"]], "two columns are called height"),
    "a short row": ("height,label", [["1", "a"], ["2"]], "line 3: it has 1 value, and the header names 2 columns"),
    "free text": ("name,label", [[f"word{i}", "ab"[i % 2]] for i in range(300)], "column name has 240 different words"),
    "another split": ("height,split,label", [["1", "dev", "a"], ["2", "train", "b"]], "split holds 'dev'; expected train or test"),
    "no test": ("height,split,label", [["1", "train", "a"], ["2", "train", "b"]], "column split says test in no row"),
}


@pytest.mark.parametrize(("header", "rows", "says"), BAD.values(), ids=BAD)
def test_a_bad_table_is_refused_in_one_sentence(header, rows, says, tmp_path):
    with pytest.raises(LabError) as error:
        data.load(few_rows(tmp_path, header, rows), "data", 32)
    assert says in str(error.value) and "table.csv" in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.array([["a"], ["b"], ["c"], ["d"]])}, "features are numbers with 2 dimensions"),
        ({"x": np.zeros((4, 0))}, "which is no feature"),
        ({"x": np.array([[1.0, np.inf], [0, 0], [0, 0], [0, 0]])}, "train_x[0, 1] is inf"),
        ({"x": np.zeros((3, 2))}, "expected a value for each of the 3 samples"),
        ({"x": np.zeros(4)}, "features numbers with 2"),
    ],
)
def test_bad_arrays_are_refused(arrays, says, tmp_path):
    labels = {"y": np.array([0, 1, 0, 1]), "split": np.array(["train", "train", "test", "test"])}
    np.savez(tmp_path / "a.npz", **labels, **arrays)
    with pytest.raises(LabError) as error:
        data.load(str(tmp_path / "a.npz"), "data", 32)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"features": np.zeros((4, 2)), "labels": np.zeros(4)}, "it has the keys features and labels"),
        ({"x": np.zeros((4, 2))}, "it has the key x"),
        ({f"a{i:02}": np.zeros(1) for i in range(20)}, "it has the keys a00, a01, a02, a03, a04 and 15 more"),
        ({}, "it has no arrays"),
    ],
)
def test_an_npz_file_with_other_keys_is_told_which_it_has(arrays, says, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(LabError, match=re.escape(f"a.npz: {says}; expected train_x, train_y, test_x and test_y, or x and y")):
        data.load(str(tmp_path / "a.npz"), "data", 32)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "none"}, "--target none is no column of"),
        ({"labels": "second.csv"}, "--labels second.csv is for the images of a folder"),
        ({"unverified": True}, "--unverified is for svhn"),
    ],
)
def test_options_that_do_not_fit_a_table_are_refused(options, says, tmp_path):
    with pytest.raises(LabError, match=says):
        data.load(few_rows(tmp_path), "data", 32, **options)
    with pytest.raises(LabError, match="--target label is for a table"):
        data.load("digits", "data", 32, target="label")
    with pytest.raises(LabError, match="it holds no images"):
        data.check_image_size("table.csv", 32)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.csv").write_text("")
    for name, says in (("a.csv", "not a text file in UTF-8"), ("b.csv", "is empty"), ("none.csv", "cannot be read")):
        with pytest.raises(LabError, match=says):
            data.load(str(tmp_path / name), "data", 32)


# parquet


@pytest.fixture
def parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    def write(**columns):
        path = tmp_path / "table.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return str(path)

    return write


def test_a_parquet_file_is_the_table_of_its_csv_file(parquet, tmp_path):
    heights = [None if i == 4 else i + 0.5 for i in range(30)]
    colours, labels = ["red" if i % 2 else "blue" for i in range(30)], ["cat" if i % 3 else "dog" for i in range(30)]
    import pyarrow

    from_parquet = parquet(height=heights, colour=pyarrow.array(colours).dictionary_encode(), tall=[i > 3 for i in range(30)], label=labels)
    rows = [
        ["" if height is None else height, *rest]
        for height, *rest in zip(heights, colours, [int(i > 3) for i in range(30)], labels, strict=True)
    ]
    from_csv = few_rows(tmp_path, "height,colour,tall,label", rows)
    assert data.load(from_parquet, "data", 32).digest() == data.load(from_csv, "data", 32).digest()


def test_a_parquet_file_with_something_else_is_refused(parquet, tmp_path):
    with pytest.raises(LabError, match="column boxes is of type list"):
        data.load(parquet(boxes=[[1], [2]], label=["a", "b"]), "data", 32)
    with pytest.raises(LabError, match="__index_level_0__ is an index that pandas writes"):
        data.load(parquet(height=[1, 2], __index_level_0__=[0, 1], label=["a", "b"]), "data", 32)
    with pytest.raises(LabError, match="has no rows"):
        data.load(parquet(height=[]), "data", 32)
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(LabError, match="cannot be read as a parquet file"):
        data.load(str(tmp_path / "no.parquet"), "data", 32)


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LabError, match=r"parquet files need pyarrow; pip install 'largemargin\[parquet\]'"):
        data.load(str(tmp_path / "table.parquet"), "data", 32)


# inputs of a network


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_are_those_of_scikit_learn(dtype):
    generator = np.random.default_rng(0)
    training = (generator.normal(size=(51, 4)) * [1, 1e-3, 1e4, 1] + [0, 5, 1e6, 3]).astype(dtype)
    training[:, 3] = 0.1
    training[generator.random((51, 4)) < 0.2] = np.nan
    held_out = generator.normal(size=(20, 4)).astype(dtype)
    imputer = SimpleImputer(strategy="median").fit(training.astype(np.float64))
    scaler = StandardScaler().fit(imputer.transform(training.astype(np.float64)))
    standard = standard_of(training, held_out)
    for values in (training, held_out):
        expected = scaler.transform(imputer.transform(values.astype(np.float64)))
        expected[:, 3] = 0.0  # a feature of one value in training says nothing, whatever it is later
        np.testing.assert_allclose(standard(values).numpy(), expected.astype(np.float32), rtol=1e-6)
        np.testing.assert_allclose(standard(values[3]).numpy(), expected[3].astype(np.float32), rtol=1e-6)


def test_large_numbers_with_a_small_spread_keep_it():
    seconds = 1.7e9 + np.arange(100.0)[:, None]  # float32 has no number between two of these and 128 further
    assert standard_of(seconds, seconds)(seconds).std() == pytest.approx(1, abs=0.01)


def test_a_feature_that_is_missing_everywhere_says_nothing():
    values = np.full((5, 1), np.nan)
    assert standard_of(values, values)(values).tolist() == [[0.0]] * 5
    assert standard_of(values, values)(values + 1000).tolist() == [[0.0]] * 5  # nothing was learnt of other values


def test_test_samples_change_no_input_of_training(digits):
    found = data.load(digits, "data", 32)
    assert isinstance(found, FeatureSet)
    other = FeatureSet(found.train_features, found.train_labels, 1000 * found.test_features, found.test_labels, found.classes)
    feeds = [InMemoryFeatures(of_recipe(digits), one, CPU) for one in (found, other)]
    assert torch.equal(feeds[0].features, feeds[1].features) and feeds[0].pixels == feeds[1].pixels


def test_held_out_and_unused_training_samples_change_no_input(digits):
    found = data.load(digits, "data", 32)
    assert isinstance(found, FeatureSet)
    recipe = of_recipe(digits, train_fraction=0.5, validation_fraction=0.2)
    feed = InMemoryFeatures(recipe, found, CPU)
    assert feed.split == "validation" and len(feed.labels) + feed.num_held_out == 718
    changed = found.train_features.clone()
    unused = torch.ones(len(changed), dtype=torch.bool)
    unused[feed.rows.training] = False
    changed[unused] *= 100
    other = InMemoryFeatures(recipe, FeatureSet(changed, found.train_labels, found.test_features, found.test_labels, found.classes), CPU)
    assert torch.equal(feed.features, other.features) and feed.pixels == other.pixels


def test_processes_share_each_batch(digits):
    found = data.load(digits, "data", 32)
    assert isinstance(found, FeatureSet)
    alone, *both = (InMemoryFeatures(of_recipe(digits), found, CPU, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    for whole, first, second in zip(alone.training(0), *(feed.training(0) for feed in both), strict=True):
        assert torch.equal(whole.images[0::2], first.images) and torch.equal(whole.target[1::2], second.target)
        assert whole.size == first.size == second.size
    later = list(alone.training(0, first_step=3))
    assert torch.equal(later[0].images, list(alone.training(0))[3].images)
    parts = [torch.cat([images for images, _ in feed.held_out()]) for feed in both]
    assert torch.equal(torch.cat(parts), torch.cat([images for images, _ in alone.held_out()]))


@pytest.mark.parametrize("setting", [{"flip": True}, {"crop_padding": 2}, {"augmentation": "inception"}, {"channels_last": True}])
def test_settings_of_images_are_refused(setting, digits):
    found = data.load(digits, "data", 32)
    assert isinstance(found, FeatureSet)
    with pytest.raises(LabError, match=f"{next(iter(setting))} .* is for images, and .* holds features"):
        InMemoryFeatures(of_recipe(digits, **setting), found, CPU)


# networks


@pytest.mark.parametrize("name", OF_FEATURES)
def test_networks_of_features_take_features_alone(name):
    network = build(Recipe("softmax", 0, network=name), 7, 3)
    assert network(torch.randn(5, 7)).shape == (5, 3) and network.features(torch.randn(5, 7)).shape == (5, network.classifier.in_features)
    check_input(name, None)
    with pytest.raises(LabError, match="takes features, and the data are images"):
        check_input(name, 32)
    with pytest.raises(LabError, match="takes images, and the data are features; choose linear or mlp"):
        check_input("small", None)


@pytest.mark.parametrize("loss", ["softmax", "large_margin", "cosface", "gaussian_mixture", "center"])
@pytest.mark.parametrize("network", OF_FEATURES)
def test_every_kind_of_loss_trains_on_features(loss, network, digits, tmp_path):
    from largemargin.lab.run.methods import LOSSES

    recipe = Recipe(loss, 0, data=digits, network=network, epochs=10, learning_rate=0.05, **LOSSES[loss])
    record = train(recipe, data.load(digits, "data", 32).few(400), tmp_path)
    assert record["num_train"] == 360 and record["test"]["error"] < 60


# the commands


@pytest.fixture(scope="module")
def compared(wine, tmp_path_factory):
    """The folder of a comparison on the wines."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = ["--losses", "softmax", "large_margin", "--seeds", "0", "1", "--epochs", "6", "--label-noise", "0.3"]
    assert cli.main(["compare", "--data", wine, *words, "--out", str(out), "--jobs", "1"]) == 0
    return out


def test_a_comparison_on_a_table_is_one_on_samples(compared, wine, capsys):
    assert cli.main(["report", str(compared)]) == 0
    html, markdown = ((compared / f"report.{kind}").read_text() for kind in ("html", "md"))
    for text in (html, markdown):
        text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
        assert "36 test samples" in text and "image" not in text and "augmentation:" not in text and "then standardised" in text
    marker = json.loads((compared / "compare.json").read_text())["comparison"]
    assert marker["network"] == "mlp" and "--network mlp" in markdown
    records = [json.loads(path.read_text()) for path in compared.glob("runs/*/result.json")]
    assert len(records) == 4 and all(record["recipe"]["network"] == "mlp" for record in records)


def test_the_same_command_repeats_no_run_and_says_the_network(compared, wine, capsys):
    words = ["--losses", "softmax", "large_margin", "--seeds", "0", "1", "--epochs", "6", "--label-noise", "0.3"]
    before = {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/result.json")}
    assert cli.main(["compare", "--data", wine, *words, "--out", str(compared), "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 already done" in said and "network: mlp (linear or mlp)" in said and "held a comparison with other options" not in said
    assert "142 training and 36 test samples of 3 classes, 17 features" in said and "IMAGES" not in said
    assert {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/result.json")} == before


def best_run(compared):
    return next(iter(compared.glob("runs/large_margin-noise0.3-seed0-*")))


def test_the_model_of_a_table_predicts_its_rows(compared, wine, tmp_path):
    run, out = best_run(compared), tmp_path / "predictions.csv"
    assert cli.main(["predict", str(run), wine, "--out", str(out)]) == 0
    lines = list(csv.DictReader(out.read_text().splitlines()))
    kept = np.load(run / "predictions.npz")
    by_line = {line["sample"]: line["prediction"] for line in lines}
    assert len(lines) == 178
    assert [by_line[name] for name in kept["ids"]] == [sorted(WINE.target_names)[i] for i in kept["predicted"]]


def test_load_gives_the_network_and_how_rows_become_inputs(compared, wine):
    run = best_run(compared)
    network, transform, classes = load(run)
    kept, found = np.load(run / "predictions.npz"), data.load(wine, "data", 32)
    assert isinstance(found, FeatureSet) and isinstance(transform, Standard) and classes == found.classes
    torch.testing.assert_close(network(transform(found.test_features)), torch.from_numpy(kept["logits"]))
    with pytest.raises(LabError, match=r"expected \(N, 17\)"):
        transform(np.zeros((2, 3)))


def test_what_a_run_on_features_cannot_predict_is_said(compared, digits, wine, tmp_path, capsys):
    run = str(best_run(compared))
    for words, says in (
        ([digits], "the run was trained on a table"),
        ([few_rows(tmp_path)], "has no column alcohol, which the run was trained on (15 are missing)"),
        ([wine, wine], "one file at a time, got 2"),
        ([wine, "--calibrate", str(tmp_path)], "--calibrate is for runs on images"),
    ):
        assert cli.main(["predict", run, *words]) == 2
        assert says in capsys.readouterr().err


def test_a_run_on_arrays_is_exported_and_predicts_arrays(digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--data", digits, "--epochs", "3", "--out", str(out), "--loss", "softmax"]) == 0
    assert "3 epochs of mlp" in capsys.readouterr().out
    assert cli.main(["export", str(out)]) == 0
    assert cli.main(["predict", str(out), digits, "--out", str(tmp_path / "p.csv"), "--top", "2"]) == 0
    lines = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert np.mean([int(line["prediction"]) == label for line, label in zip(lines, load_digits().target, strict=True)]) > 0.9
    np.savez(tmp_path / "flat.npz", x=np.zeros(64))
    assert cli.main(["predict", str(out), str(tmp_path / "flat.npz")]) == 2
    assert "expected numbers with 2 dimensions, (N, D), under the key x" in capsys.readouterr().err


def test_a_choice_of_lam_on_a_part_of_the_data(digits, tmp_path):
    words = ["--losses", "softmax", "large_margin", "--lam", "0.1", "1", "--seeds", "0", "--epochs", "2", "--train-fraction", "0.3"]
    assert cli.main(["compare", "--data", digits, *words, "--network", "linear", "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert "How λ was chosen" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--network", "small"], "network small takes images, and the data are features"),
        (["--recipe.flip", "true"], "flip true is for images"),
        (["--image-size", "32"], "it holds no images"),
        (["--train-fraction", "0.01"], "add samples"),
        (["--target", "ash"], "column ash"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_any_run(words, says, wine, tmp_path, capsys):
    assert cli.main(["compare", "--data", wine, *words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_network_of_features_is_refused_for_images(tmp_path, capsys):
    assert cli.main(["compare", "--network", "mlp", "--out", str(tmp_path / "out")]) == 2
    assert "network mlp takes features, and the data are images" in capsys.readouterr().err


def test_the_place_of_a_row_is_that_in_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('height,label\n\n1,"a\nb"\n2,c\n')
    table = read_table(tmp_path / "a.csv")
    assert [table.place(row) for row in range(2)] == ["line 4", "line 5"]


def test_large_whole_numbers_in_parquet_are_classes_of_their_own(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"width": [float(i) for i in range(20)], "label": [1000000, 1000001] * 10}
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    assert data.load(str(tmp_path / "table.parquet"), "data", 32).classes == ("1000000", "1000001")
