"""What `largemargin inspect` takes from a file is what the file means, or it says why it does not."""

import itertools
import json
import math

import numpy as np
import pytest

from combinations import every
from largemargin.lab import cli

NAMES = ["cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx", "mole", "newt"]


def rows(num_rows=60, num_classes=12):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(0, 1.5, (num_rows, num_classes))
    logits[np.arange(num_rows), labels] += 3
    return logits, labels


LOGITS, LABELS = rows()
ERROR = (LOGITS.argmax(1) != LABELS).mean()


def write(path, columns, separator=","):
    """A CSV file of columns of strings or numbers, by their names."""
    lines = [separator.join(columns)]
    lines += [separator.join(v if isinstance(v, str) else repr(float(v)) for v in row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def table(names=NAMES, labels=LABELS, logits=LOGITS, order=None):
    order = range(len(names)) if order is None else order
    return {"label": [str(label) for label in labels], **{names[c]: logits[:, c] for c in order}}


def summary(capsys, path, *options):
    assert cli.main(["inspect", str(path), "--json", *options]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return json.loads(captured.out)


def refused(capsys, path, *options):
    assert cli.main(["inspect", str(path), *options]) == 2
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1
    return captured.err


def ece(p, labels):
    gaps, bins = p.max(1) - (p.argmax(1) == labels), np.minimum((p.max(1) * 15).astype(int), 14)
    return sum(abs(gaps[bins == b].sum()) for b in range(15)) / len(labels)


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


# columns that are no class

COUNTS = np.arange(len(LABELS))
SHUFFLED = np.random.default_rng(1).permutation(len(LABELS))
NO_CLASSES = {
    "pandas' index": ({"": COUNTS}, "index=False"),
    "pandas' index read and written": ({"Unnamed: 0": COUNTS}, "index=False"),
    "an id": ({"id": COUNTS}, "column id numbers the rows"),
    "an id from 1": ({"image": COUNTS + 1}, "column image numbers the rows"),
    "a shuffled index": ({"index": SHUFFLED}, "column index numbers the rows"),
    "the index of a part": ({"key": 7 * SHUFFLED + 3}, "column key holds whole numbers"),
    "an id of a part": ({"Sample_ID": 7 * SHUFFLED + 3}, "column Sample_ID has another whole number in each row"),
    "predictions": ({"prediction": LOGITS.argmax(1)}, "column prediction holds whole numbers"),
    "times": ({"time": 1.7e9 + 60.5 * COUNTS}, "column time changes by the same amount"),
    "halves": ({"at": 0.1 * COUNTS}, "column at changes by the same amount"),
    "names of files": ({"file": [f"img{i}.png" for i in COUNTS]}, "every column but label must hold numbers"),
    "folds": ({"fold": COUNTS % 5}, "column fold holds whole numbers"),
    "the largest logit": ({"best": LOGITS.max(1)}, "column best is the largest of the others"),
    "the largest probability": ({"sure": softmax(LOGITS).max(1).round(3)}, "column sure is the probability of the largest"),
}
BESIDE = {  # other classes, and what is no class beside them
    "predictions beside whole logits": (table(logits=LOGITS.round()), {"top": LOGITS.round().argmax(1)}, "column top is the number of"),
    "a figure beside probabilities": (table(logits=softmax(LOGITS)), {"doubt": LOGITS[:, 0]}, "without it every row is in [0, 1] and sums"),
    "a figure beside numbered classes": (
        table([f"c{c}" for c in range(12)]),
        {"conf": LOGITS[:, 0]},
        "conf is not named as the classes are",
    ),
    "a figure beside named logits": (table([f"logit_{n}" for n in NAMES]), {"conf": LOGITS[:, 0]}, "conf is not named as the classes are"),
}


@every("kind", [*NO_CLASSES, *BESIDE])
def test_a_column_that_is_no_class_is_refused(kind, tmp_path, capsys):
    classes, column, said = BESIDE[kind] if kind in BESIDE else (table(), *NO_CLASSES[kind])
    for columns in ({**column, **classes}, {**classes, **column}):
        assert said in refused(capsys, write(tmp_path / "a.csv", columns))


def test_an_index_is_refused_among_whole_logits_too(tmp_path, capsys):
    columns = table(logits=LOGITS.round())
    assert summary(capsys, write(tmp_path / "whole.csv", columns))["classes"] == 12
    assert "numbers the rows" in refused(capsys, write(tmp_path / "index.csv", {"nr": COUNTS, **columns}))


def test_constant_and_masked_classes_are_classes(tmp_path, capsys):
    logits = np.insert(LOGITS, 12, [[0.0], [-100.0], [-math.inf]], axis=1)
    columns = table([*NAMES, "dead", "low", "masked"], logits=logits)
    found = summary(capsys, write(tmp_path / "a.csv", columns))
    assert found["classes"] == 15 and found["overall"]["error"] == pytest.approx((logits.argmax(1) != LABELS).mean())


@every("name", ["confidence", "Entropy", "score", "id", "conf", "pred"])
def test_a_name_that_is_hardly_that_of_a_class_is_warned_of(name, tmp_path, capsys):
    path = write(tmp_path / "a.csv", {**table(), name: LOGITS[:, 0] ** 2})
    (warning,) = summary(capsys, path)["warnings"]
    assert f"column {name} was taken for the logit of a class" in warning


def test_names_are_unique(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("label,a,b,a\n0,1,2,3\n")
    assert "two columns are called a" in refused(capsys, tmp_path / "a.csv")


# labels and columns

SORTED_AS_TEXT = sorted(range(12), key=str)  # 0, 1, 10, 11, 2, ...
REVERSED = list(range(12))[::-1]


@every(
    "form, first",
    [
        *itertools.product(["{}", "{}.0", "logit_{}", "class {}", "c{}", "{:03}"], [0, 1]),
        *itertools.product(["logits[{}]", "p({})", "{}_logit", "class{}_score", "resnet50_{}", "resnet50_{}.0"], [0, 1]),
        *((form, 40) for form in ("{}", "{}.0", "{:03}")),
    ],
)
def test_numbered_columns_are_matched_by_number(form, first, tmp_path, capsys):
    names = [form.format(c + first) for c in range(12)]
    said = f"the columns were put into the order of their numbers, {names[0]} to {names[-1]}; in the file they are in another"
    for order, warnings in ((range(12), []), (SORTED_AS_TEXT, [said]), (REVERSED, [said])):
        found = summary(capsys, write(tmp_path / "a.csv", table(names, LABELS + first, order=order)))
        assert found["overall"]["error"] == pytest.approx(ERROR)
        assert [of_class["name"] for of_class in found["per_class"]] == names
        assert found["warnings"] == warnings


def test_numbers_may_be_negative(tmp_path, capsys):
    found = summary(capsys, write(tmp_path / "a.csv", table(["1", "-1"], 2 * (LABELS % 2) - 1, LOGITS[:, :2])))
    assert found["overall"]["error"] == pytest.approx((LOGITS[:, :2].argmax(1) != (LABELS + 1) % 2).mean())
    assert [of_class["name"] for of_class in found["per_class"]] == ["-1", "1"]


def test_numbers_that_do_not_count_are_names(tmp_path, capsys):
    names = [f"boeing{n}" for n in (747, 707, 737)]
    found = summary(capsys, write(tmp_path / "a.csv", table(names, LABELS % 3, LOGITS[:, :3])))
    assert [of_class["name"] for of_class in found["per_class"]] == names
    assert found["overall"]["error"] == pytest.approx((LOGITS[:, :3].argmax(1) != LABELS % 3).mean())


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["a_0", "a_1", "a_2", "b_0", "b_1", "b_2"], True),
        (["old[2]", "new[2]", "old[1]", "new[1]", "old[3]", "new[3]"], True),
        (["cat", "dog", "emu", "fox", "gnu", "hen"], False),
        (["a_0", "a_1", "a_2", "b_0", "b_1", "b_3"], False),
        (["boeing737", "boeing747", "airbus737", "airbus747", "cessna737", "cessna747"], False),
        (["0", "1", "2", "3", "4", "5"], False),
    ],
)
def test_columns_of_two_classifiers_are_warned_of(names, warned, tmp_path, capsys):
    found = summary(capsys, write(tmp_path / "a.csv", table(names, LABELS % 3, LOGITS[:, :6])))
    assert any("those of 2 classifiers" in line for line in found["warnings"]) == warned


def test_a_name_may_have_a_line_break(tmp_path, capsys):
    names = [f'"{name}\nsmall"' for name in NAMES]
    found = summary(capsys, write(tmp_path / "a.csv", table(names)))
    assert found["overall"]["error"] == pytest.approx(ERROR) and found["per_class"][0]["name"] == "cat\nsmall"


def test_a_label_that_is_no_number_of_a_column_is_refused(tmp_path, capsys):
    columns = table([str(c + 1) for c in range(12)])
    said = refused(capsys, write(tmp_path / "a.csv", columns))
    assert "labels must be numbers of columns (1 to 12)" in said and "has 0" in said


def test_half_numbered_columns_are_refused(tmp_path, capsys):
    assert "and b is not" in refused(capsys, write(tmp_path / "a.csv", table(["1", "b", "0"], LABELS % 3, LOGITS[:, :3])))


@pytest.mark.parametrize("form", ["{}", "logit_{}", "p({})", "score.{}"])
def test_labels_may_be_words(form, tmp_path, capsys):
    if form == "p({})":
        names, labels = [form.format(name) for name in NAMES], [form.format(NAMES[c]) for c in LABELS]
    else:
        names, labels = [form.format(name) for name in NAMES], [NAMES[c] for c in LABELS]
    found = summary(capsys, write(tmp_path / "a.csv", table(names, labels, order=REVERSED)))
    assert found["overall"]["error"] == pytest.approx(ERROR)


def test_a_word_that_names_no_class_is_refused(tmp_path, capsys):
    labels = [NAMES[c] for c in LABELS]
    labels[7] = "cow"
    assert "label 'cow' of row 7 names no class; the classes are: cat, dog" in refused(
        capsys, write(tmp_path / "a.csv", table(labels=labels))
    )


def test_npz_takes_words_with_the_names_of_the_classes(tmp_path, capsys):
    words = np.array(NAMES)[LABELS]
    np.savez(tmp_path / "a.npz", logits=LOGITS, labels=words, classes=NAMES)
    found = summary(capsys, tmp_path / "a.npz")
    assert found["overall"]["error"] == pytest.approx(ERROR) and found["per_class"][0]["name"] == "cat"
    np.savez(tmp_path / "b.npz", logits=LOGITS, labels=words)
    assert "classes=names" in refused(capsys, tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", logits=LOGITS, labels=LABELS, classes=NAMES[:3])
    assert "a name for each of the 12 columns" in refused(capsys, tmp_path / "c.npz")


@pytest.mark.parametrize("numbers", [np.arange(1, 13), np.arange(12)[::-1], 10 * np.arange(12)], ids=["from 1", "turned", "gaps"])
def test_npz_matches_labels_to_classes_that_are_numbers(numbers, tmp_path, capsys):
    known = LABELS < 11  # a label out of range would show the mistake
    np.savez(tmp_path / "a.npz", logits=LOGITS[known], labels=numbers[LABELS[known]], classes=numbers)
    found = summary(capsys, tmp_path / "a.npz")
    rows = {of_class["name"]: of_class["rows"] for of_class in found["per_class"]}
    assert found["overall"]["error"] == pytest.approx((LOGITS.argmax(1) != LABELS)[known].mean())
    assert rows == {str(number): int((LABELS[known] == c).sum()) for c, number in enumerate(numbers)}


def test_npz_takes_labels_as_places_where_the_names_are_text(tmp_path, capsys):
    names = sorted(map(str, range(12)))  # as the classes of torchvision's ImageFolder
    np.savez(tmp_path / "a.npz", logits=LOGITS, labels=LABELS, classes=names)
    found = summary(capsys, tmp_path / "a.npz")
    assert found["overall"]["error"] == pytest.approx(ERROR) and [of_class["name"] for of_class in found["per_class"]] == names


def test_npz_refuses_a_label_that_is_none_of_the_numbers(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=LOGITS, labels=LABELS, classes=np.arange(1, 13))
    assert "labels must be numbers of columns (1 to 12)" in refused(capsys, tmp_path / "a.npz")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators(separator, tmp_path, capsys):
    found = summary(capsys, write(tmp_path / "a.csv", table(), separator))
    assert found["classes"] == 12 and found["overall"]["error"] == pytest.approx(ERROR)


def test_with_semicolons_a_comma_may_be_the_decimal_point(tmp_path, capsys):
    for labels in (LABELS, [f"{label},0" for label in LABELS], [f'"{c},{c + 1}"' for c in LABELS]):
        names = [f'"{c},{c + 1}"' for c in range(12)] if '"' in str(labels[0]) else NAMES
        path = write(tmp_path / "a.csv", table(names, labels), ";")
        path.write_text(path.read_text().replace(".", ","))
        assert summary(capsys, path)["overall"]["error"] == pytest.approx(ERROR)


# masked classes


def masked_rows():
    logits = LOGITS.copy()
    masks = np.random.default_rng(2).random(logits.shape) < 0.4
    masks[np.arange(len(LABELS)), LABELS] = False
    masks[np.arange(len(LABELS)), (LABELS + 1) % 12] = False
    logits[masks] = -np.inf
    return logits


@pytest.mark.parametrize("kind", ["npz", "csv"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_a_masked_class_is_not_in_its_row(kind, dtype, tmp_path, capsys):
    logits = masked_rows().astype(dtype)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", logits=logits, labels=LABELS)
    else:
        write(tmp_path / "a.csv", table(logits=logits))
    found = summary(capsys, tmp_path / f"a.{kind}")["overall"]
    wanted: dict[str, list[float]] = {"error": [], "nll": [], "margin": [], "rho_hat": []}
    for row, label in zip(logits.astype(np.float64), LABELS, strict=True):
        known = np.flatnonzero(row > -np.inf)
        others = row[known[known != label]]
        wanted["error"].append(row.argmax() != label)
        wanted["nll"].append(np.log(np.exp(row[known]).sum()) - row[label])
        wanted["margin"].append(row[label] - others.max())
        wanted["rho_hat"].append(np.log(np.exp(others).sum()) - others.max())
    for name, values in wanted.items():
        assert found[name] == pytest.approx(np.mean(values)), name
    assert found["ece"] == pytest.approx(ece(softmax(logits.astype(np.float64)), LABELS))


@pytest.mark.parametrize(
    ("row", "said"),
    [([0.0, 1.0, -math.inf], "-inf for its own label"), ([-math.inf, -math.inf, 0.0], "-inf for all classes but one")],
)
def test_a_row_without_a_finite_margin_is_refused(row, said, tmp_path, capsys):
    logits = np.vstack([np.zeros((3, 3)), row, np.zeros((2, 3))])
    np.savez(tmp_path / "a.npz", logits=logits, labels=np.full(6, 2))
    assert f"row 3 has {said}" in refused(capsys, tmp_path / "a.npz")


# probabilities


@pytest.mark.parametrize("kind", ["npz", "csv"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_probabilities_are_warned_of_and_their_logarithms_are_taken(kind, dtype, tmp_path, capsys):
    p = softmax(LOGITS).astype(dtype)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", logits=p, labels=LABELS)
    else:
        write(tmp_path / "a.csv", table(logits=p))
    path = tmp_path / f"a.{kind}"
    (warning,) = summary(capsys, path)["warnings"]
    assert "look like probabilities" in warning and "--probabilities" in warning
    found = summary(capsys, path, "--probabilities")
    assert found["warnings"] == []
    wide = p.astype(np.float64)
    assert found["overall"]["ece"] == pytest.approx(ece(wide / wide.sum(1, keepdims=True), LABELS))
    assert found["overall"]["nll"] == pytest.approx(-np.log(wide / wide.sum(1, keepdims=True))[np.arange(60), LABELS].mean())
    assert cli.main(["inspect", str(path)]) == 0
    assert "warning: these look like probabilities" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (np.round(softmax(LOGITS), 2), "give --probabilities"),
        (100 * softmax(LOGITS), "divide them by 100"),
        (1 / (1 + np.exp(-LOGITS)), "sigmoids"),
    ],
    ids=["rounded", "percent", "sigmoid"],
)
def test_other_numbers_that_are_no_logits_are_warned_of(numbers, said, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=numbers, labels=LABELS)
    (warning,) = summary(capsys, tmp_path / "a.npz")["warnings"]
    assert said in warning


def test_negative_log_probabilities_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=-np.log(softmax(LOGITS)), labels=LABELS)
    assert "these are negative log-probabilities" in refused(capsys, tmp_path / "a.npz")


def test_logits_are_not_warned_of(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=LOGITS, labels=LABELS)
    assert summary(capsys, tmp_path / "a.npz")["warnings"] == []
    np.savez(tmp_path / "b.npz", logits=np.log(softmax(LOGITS)), labels=LABELS)
    assert summary(capsys, tmp_path / "b.npz")["warnings"] == []


def test_what_is_no_probability_is_refused_as_one(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=LOGITS, labels=LABELS)
    assert "row 0 is none" in refused(capsys, tmp_path / "a.npz", "--probabilities")
    p = softmax(LOGITS)
    p[3] = np.eye(12)[(LABELS[3] + 1) % 12]
    np.savez(tmp_path / "b.npz", logits=p, labels=LABELS)
    assert "row 3 has a probability of 0 for its own label" in refused(capsys, tmp_path / "b.npz", "--probabilities")


def test_a_probability_of_0_masks_its_class(tmp_path, capsys):
    logits = masked_rows()
    np.savez(tmp_path / "a.npz", logits=softmax(logits), labels=LABELS)
    np.savez(tmp_path / "b.npz", logits=logits, labels=LABELS)
    of_probabilities = summary(capsys, tmp_path / "a.npz", "--probabilities")["overall"]
    assert of_probabilities == pytest.approx(summary(capsys, tmp_path / "b.npz")["overall"])


# columns with gaps and in order


def test_numbered_columns_with_a_gap_are_matched_by_number(tmp_path, capsys):
    kept = (LABELS != 5) & (LABELS != 11)
    labels = LABELS[kept]
    columns = {f"c{c}": LOGITS[kept][:, c] for c in range(12) if c != 5}
    found = summary(capsys, write(tmp_path / "gap.csv", {"label": [str(label) for label in labels], **columns}))
    without = np.delete(LOGITS[kept], 5, 1)
    places = np.where(labels > 5, labels - 1, labels)
    assert found["overall"]["error"] == pytest.approx((without.argmax(1) != places).mean())


@pytest.mark.parametrize("values", [np.arange(60), np.cumsum(np.random.default_rng(1).random(60)), -(np.arange(60.0) ** 2)])
def test_a_column_in_order_is_no_class(values, tmp_path, capsys):
    np.savez(tmp_path / "index.npz", logits=np.c_[values, LOGITS], labels=LABELS)
    assert "column 0 of logits rises or falls from every row to the next" in refused(capsys, tmp_path / "index.npz")
    assert "so it is not the logit of a class" in refused(capsys, write(tmp_path / "t.csv", {"t": values, **table()}))
