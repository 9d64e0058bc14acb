"""The command ``largemargin inspect``: its figures are those of the definitions, and every bad file gets one line."""

import io
import json
import math
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from rich.console import Console

import largemargin.lab.logits.summary as inspect_module
from combinations import every
from largemargin.lab import cli
from largemargin.lab.logits.by_class import figures as figures_of
from largemargin.lab.logits.by_class import rows_of
from largemargin.lab.logits.files import Labelled
from largemargin.lab.predictions import Predictions
from largemargin.metrics import MarginMetrics

CLASSES = 4


def rows(num_rows=60, dtype=np.float64):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES - 1, num_rows)  # the last class has no row
    logits = rng.normal(0, 2, (num_rows, CLASSES))
    logits[np.arange(num_rows), labels] += 2
    return logits.astype(dtype), labels


def write_npz(path, logits, labels, **others):
    np.savez(path, logits=logits, labels=labels, **others)
    return path


def write_csv(path, logits, labels, header="cat,dog,label,[b]bird,fish"):
    table = np.insert(logits, 2, labels, axis=1)
    np.savetxt(path, table, delimiter=",", header=header, comments="", fmt="%.17g")
    return path


def figures(logits, labels):
    """From the definitions, in numpy."""
    index = np.arange(len(labels))
    others = logits.copy()
    others[index, labels] = -np.inf
    target, largest = logits[index, labels], others.max(1)
    lse = largest + np.log(np.exp(others - largest[:, None]).sum(1))
    q = np.exp(others - lse[:, None])
    mean_of_others = np.where(np.isinf(others), 0, others).sum(1) / (CLASSES - 1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gaps = p.max(1) - (logits.argmax(1) == labels)
    bins = np.minimum((p.max(1) * 15).astype(int), 14)
    return {
        "rows": len(labels),
        "error": (logits.argmax(1) != labels).mean(),
        "margin": (target - largest).mean(),
        "rho_hat": (lse - largest).mean(),
        "divergence": ((q * np.where(np.isinf(others), 0, others)).sum(1) - mean_of_others).mean() / 2,
        "nll": -np.log(p[index, labels]).mean(),
        "ece": sum(abs(gaps[bins == b].sum()) for b in range(15)) / len(labels),
    }


def run(capsys, *arguments):
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


@pytest.mark.parametrize("chunk", [2**22, 7 * CLASSES, 1])
@pytest.mark.parametrize("write", [write_npz, write_csv], ids=["npz", "csv"])
def test_figures_are_those_of_the_definitions(write, chunk, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect_module, "CHUNK", chunk)
    logits, labels = rows()
    path = write(tmp_path / f"logits.{'npz' if write is write_npz else 'csv'}", logits, labels)
    summary = json.loads(run(capsys, path, "--json", "--top", 5))
    assert summary["file"] == str(path) and summary["classes"] == CLASSES
    for name, value in figures(logits, labels).items():
        assert summary["overall"][name] == pytest.approx(value, rel=1e-10), name
    for c in range(CLASSES - 1):
        for name, value in figures(logits[labels == c], labels[labels == c]).items():
            assert summary["per_class"][c][name] == pytest.approx(value, rel=1e-10), name
    assert summary["per_class"][-1]["rows"] == 0 and summary["per_class"][-1]["margin"] is None
    assert [of_class["name"] for of_class in summary["per_class"]] == (
        ["0", "1", "2", "3"] if write is write_npz else ["cat", "dog", "[b]bird", "fish"]
    )


def test_the_rows_listed_are_the_worst(tmp_path, capsys):
    logits, labels = rows()
    summary = json.loads(run(capsys, write_npz(tmp_path / "a.npz", logits, labels), "--json", "--top", 5))
    p = np.exp(logits - logits.max(1, keepdims=True))
    confidence = p.max(1) / p.sum(1)
    wrong = [i for i in range(len(labels)) if logits[i].argmax() != labels[i]]
    expected = sorted(wrong, key=lambda i: -confidence[i])[:5]
    assert [row["row"] for row in summary["confident_mistakes"]] == expected
    others = [max(np.delete(logits[i], labels[i])) for i in range(len(labels))]
    margin = logits[np.arange(len(labels)), labels] - others
    assert [row["row"] for row in summary["smallest_margins"]] == np.argsort(margin)[:5].tolist()
    for row in summary["confident_mistakes"] + summary["smallest_margins"]:
        i = row["row"]
        assert (row["label"], row["prediction"]) == (labels[i], logits[i].argmax())
        assert row["confidence"] == pytest.approx(confidence[i]) and row["margin"] == pytest.approx(margin[i])


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "int32"])
def test_every_kind_of_number_is_read(dtype, tmp_path, capsys):
    logits, labels = rows(dtype=dtype)
    summary = json.loads(run(capsys, write_npz(tmp_path / "a.npz", logits, labels.astype("uint8")), "--json"))
    expected = figures(logits.astype(np.float64), labels)
    assert summary["overall"]["margin"] == pytest.approx(expected["margin"])


def test_the_tables_say_what_the_json_says(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", *rows())
    summary, text = json.loads(run(capsys, path, "--json")), run(capsys, path)
    overall = summary["overall"]
    for cell in (f"{overall['margin']:.3f}", f"{100 * overall['ece']:.2f}", f"{overall['nll']:.4f}", "[b]bird", "n/a"):
        assert cell in text
    assert "60 rows, 4 classes" in text and "rho-hat" in text
    for row in summary["confident_mistakes"] + summary["smallest_margins"]:
        assert f"{row['confidence']:.4f}" in text and f"{row['margin']:.3f}" in text


def test_without_mistakes_none_is_said(tmp_path, capsys):
    text = run(capsys, write_npz(tmp_path / "a.npz", 9 * np.eye(3), np.arange(3)))
    assert "the most confident mistakes\nnone\n" in text


def test_top_is_how_many_rows_are_listed(tmp_path, capsys):
    path = write_npz(tmp_path / "a.npz", *rows())
    assert len(json.loads(run(capsys, path, "--json"))["smallest_margins"]) == 10
    assert len(json.loads(run(capsys, path, "--json", "--top", 1000))["smallest_margins"]) == 60


@pytest.mark.parametrize("width", [40, 60, 140])
def test_no_figure_is_lost_on_a_narrow_terminal(width, tmp_path):
    output = io.StringIO()
    summary = inspect_module.summarise(write_npz(tmp_path / "a.npz", *rows()), 3)
    inspect_module.print_summary(summary, Console(width=width, file=output))
    assert "…" not in output.getvalue()


def test_a_csv_may_have_quotes_a_byte_order_mark_and_spaces(tmp_path, capsys):
    (tmp_path / "a.csv").write_text('\ufeff"label", "a, b" ,c\r\n"0",1.5,0\r\n1.0, 0,1e0\r\n', encoding="utf-8")
    summary = json.loads(run(capsys, tmp_path / "a.csv", "--json"))
    assert summary["overall"]["margin"] == 1.25 and summary["overall"]["rows"] == 2


LOGITS, LABELS = rows(6)


def with_value(array, value):
    changed = array.astype(type(value))
    changed.flat[5] = value
    return changed


BAD_ARRAYS = {
    "no labels": ({"logits": LOGITS}, "has no array labels (it has: logits)"),
    "no logits": ({"labels": LABELS, "x": LABELS}, "has no array logits (it has: labels, x)"),
    "logits of one dimension": (
        {"logits": LOGITS[0], "labels": LABELS},
        "logits must have the shape (N, C) and labels (N,), got (4,) and (6,)",
    ),
    "lengths differ": ({"logits": LOGITS, "labels": LABELS[:5]}, "got (6, 4) and (5,)"),
    "one-hot labels": ({"logits": LOGITS, "labels": np.eye(4, dtype=int)}, "got (6, 4) and (4, 4)"),
    "no rows": ({"logits": LOGITS[:0], "labels": LABELS[:0]}, "has no rows"),
    "one class": ({"logits": LOGITS[:, :1], "labels": LABELS * 0}, "at least 2 classes, got 1"),
    "objects": ({"logits": LOGITS.astype(object), "labels": LABELS}, "logits is an array of Python objects"),
    "text": ({"logits": LOGITS.astype(str), "labels": LABELS}, "logits must be numbers, got <U32; convert them"),
    "complex": ({"logits": LOGITS.astype(complex), "labels": LABELS}, "logits must be numbers, got complex128"),
    "float labels": ({"logits": LOGITS, "labels": LABELS * 1.0}, "labels must be integers, got float64; convert them with labels.astype"),
    "NaN": (
        {"logits": with_value(LOGITS, math.nan), "labels": LABELS},
        "logits must be finite and in the range of float32, row 1 has nan for class 1",
    ),
    "inf": ({"logits": with_value(LOGITS, math.inf), "labels": LABELS}, "row 1 has inf for class 1"),
    "huge": ({"logits": with_value(LOGITS, 1e300), "labels": LABELS}, "row 1 has 1e+300 for class 1"),
    "label too large": (
        {"logits": LOGITS, "labels": with_value(LABELS, 4)},
        "labels must be in [0, 4), row 5 has 4 (1 of 6 are out of range)",
    ),
    "label negative": ({"logits": LOGITS, "labels": with_value(LABELS, -1)}, "row 5 has -1"),
}


def assert_refused(capsys, path, said):
    assert cli.main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"largemargin: {path}") and said in captured.err


@every("kind", BAD_ARRAYS)
def test_bad_arrays_get_one_line(kind, tmp_path, capsys):
    arrays, said = BAD_ARRAYS[kind]
    np.savez(tmp_path / "bad.npz", **arrays)
    assert_refused(capsys, tmp_path / "bad.npz", said)


def test_float16_logits_are_checked_too(tmp_path, capsys):
    assert_refused(capsys, write_npz(tmp_path / "a.npz", with_value(LOGITS, math.inf).astype("float16"), LABELS), "row 1 has inf")


@every(
    "content, said",
    [
        ("", "is empty; its first line must name the columns"),
        ("a,b,c\n1,2,3\n", "must have one column label, has 0 (its first line is: a, b, c)"),
        ("label,label,c\n1,2,3\n", "must have one column label, has 2"),
        ("label,a,b\n", "has a header and no rows"),
        ("label,a,b\n\n\n", "has a header and no rows"),
        ("label,a,b\n0,1\n", "row 0 has 2 columns, and the header names 3"),
        ("label,a,b\n0,1,2\n0,1\n", "row 1 has 2 columns, and the header names 3"),
        ("label,a,b\n0,1\n0,1,2\n", "row 0 has 2 columns, and the header names 3"),
        ("label;a;b\n0;1\n", "row 0 has 2 columns, and the header names 3"),
        ("label,a,b\n0,1,2\n0,x,2\n", "column a has 'x' in row 1; every column but label must hold numbers"),
        ("label,a,b\n0,,2\n", "column a has '' in row 0"),
        ("label,a,b\n0.5,1,2\n", "labels must be integers, row 0 has 0.5"),
        ("label,a,b\nnan,1,2\n", "labels must be integers, row 0 has nan"),
        ("label,a,b\ninf,1,2\n", "labels must be in [0, 2), row 0 has inf"),
        ("label,a,b\n0,1,2\n2,1,2\n", "labels must be in [0, 2), row 1 has 2 (1 of 2 are out of range)"),
        ("label,a,b\n0,1,2\n0,nan,2\n", "logits must be finite and in the range of float32, row 1 has nan for class 0"),
        ("label,a\n0,1\n", "at least 2 classes, got 1"),
        ("label\n0\n", "at least 2 classes, got 0"),
        (b"label,a,b\n0,1,\xff\n", "is not a text file in UTF-8"),
        (b"\xff\xfe\x00\x01", "is not a text file in UTF-8"),
        (b"label,a,b\n0,1,2\x00\n", "column b has '2\\x00' in row 0"),
    ],
)
def test_bad_csv_gets_one_line(content, said, tmp_path, capsys):
    (tmp_path / "bad.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(capsys, tmp_path / "bad.csv", said)


def test_files_that_are_no_archive_get_one_line(tmp_path, capsys):
    whole = write_npz(tmp_path / "whole.npz", *rows()).read_bytes()
    bad = tmp_path / "bad.npz"
    for content, said in (
        (b"", "is empty"),
        (b"not a zip", "is not an .npz archive, or is cut short"),
        (whole[: len(whole) // 2], "is not an .npz archive, or is cut short"),
        (whole[:200] + b"????????" + whole[208:], "is damaged"),  # the checksum tells
    ):
        bad.write_bytes(content)
        assert_refused(capsys, bad, said)
    np.save(tmp_path / "array.npy", LOGITS)
    bad.write_bytes((tmp_path / "array.npy").read_bytes())
    assert_refused(capsys, bad, "is not an .npz archive")


@every("position", range(0, 400, 7))
def test_a_damaged_byte_never_gives_a_traceback(position, tmp_path, capsys):
    path = write_npz(tmp_path / "a.npz", *rows(6))
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    assert cli.main(["inspect", str(path)]) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_an_archive_of_other_things_gets_one_line(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("logits", "not an array")
        archive.writestr("labels", "not an array")
    assert_refused(capsys, tmp_path / "bad.npz", "logits is not a numpy array")


def test_paths_that_are_no_file_get_one_line(tmp_path, capsys):
    (tmp_path / "folder.npz").mkdir()
    assert_refused(capsys, tmp_path / "folder.npz", "is not a file")
    assert_refused(capsys, tmp_path / "nosuch.csv", "is not there")
    (tmp_path / "link.csv").symlink_to("nosuch.csv")
    assert_refused(capsys, tmp_path / "link.csv", "is a link to nosuch.csv, which is not there")
    assert_refused(capsys, tmp_path / "logits.pt", "the name must end in .npz")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "FILE is missing"),
        (["a.npz", "--top", "0"], "top"),
        (["a.npz", "--top", "x"], "--top must be a whole number from 1 on, got x"),
        (["a.npz", "--nosuch"], "nosuch"),
    ],
)
def test_bad_options_get_one_clear_line(arguments, said, capsys):
    assert cli.main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("largemargin: ") and len(error.splitlines()) == 1


def test_help_does_not_import_torch():
    code = """
import sys
from largemargin.lab.cli import main
try:
    main(["inspect", "--help"])
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--top" in done.stdout and "--json" in done.stdout


# many classes, and the predictions of a run


@pytest.mark.parametrize("chunk", [2**18, 1])
def test_the_figures_of_a_class_are_those_of_margin_metrics_on_its_rows(chunk):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 9, 400)
    labels[labels == 4] = 5  # no row of that class
    logits = rng.normal(0, 2, (400, 9)).astype(np.float32)
    logits[np.arange(400), labels] += 2
    logits[:100] = logits[:100].round()  # many are equal
    logits[100:120, 8] = np.where(labels[100:120] == 8, 0, -np.inf)
    rows = rows_of(Labelled(logits, labels, list("abcdefghi")), chunk)
    groups = {"all": (np.zeros_like(labels), 1), "by class": (labels, 9)}
    for of_rows, count in groups.values():
        for group, found in enumerate(figures_of(rows, of_rows, count)):
            counted = MarginMetrics()
            counted.update(torch.from_numpy(logits[of_rows == group]).double(), torch.from_numpy(labels[of_rows == group]))
            expected = counted.compute()
            assert found.keys() == {"error", *expected}
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-12, nan_ok=True), (group, name)


def many_classes(tmp_path, num_classes=30):
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(num_classes - 1), 4)  # the last class has no row
    logits = rng.normal(0, 1, (len(labels), num_classes))
    logits[np.arange(len(labels)), labels] += 2
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels, classes=np.array([f"class{c:02}" for c in range(num_classes)]))
    return tmp_path / "a.npz"


def test_of_many_classes_the_worst_are_printed(tmp_path, capsys):
    path = many_classes(tmp_path)
    summary = json.loads(run(capsys, path, "--json"))
    assert len(summary["per_class"]) == 30
    text, whole = run(capsys, path, "--top", 1), run(capsys, path, "--top", 1, "--classes", "all")
    table = text[text.index("largest error") : text.index("the most confident")]
    printed = re.findall(r"class\d\d", table)
    errors = {of_class["name"]: of_class["error"] for of_class in summary["per_class"] if of_class["rows"]}
    assert "the 20 classes of the largest error (--classes all prints all 30)" in text and len(printed) == 20
    assert [errors[name] for name in printed] == sorted(errors.values(), reverse=True)[:20]
    assert all(f"class{c:02}" in whole for c in range(30)) and "by class" in whole


def test_a_run_is_inspected_by_its_folder_with_names_of_classes_and_files(tmp_path, capsys):
    logits, labels = rows(6)
    Predictions(logits, labels, np.array([f"test/{i}.png" for i in range(6)])).save(tmp_path / "predictions.npz")
    (tmp_path / "result.json").write_text(json.dumps({"classes": ["cat", "dog", "emu", "fox"]}))
    for given in (tmp_path, tmp_path / "predictions.npz"):
        summary = json.loads(run(capsys, given, "--json"))
        assert [of_class["name"] for of_class in summary["per_class"]] == ["cat", "dog", "emu", "fox"]
        assert all(row["file"] == f"test/{row['row']}.png" for row in summary["smallest_margins"])
        text = run(capsys, given)
        assert "emu" in text and "test/5.png" in text


def test_a_run_without_predictions_says_how_to_have_them(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{}")
    assert_refused(capsys, tmp_path, "kept no predictions.npz")


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"classes": ["cat"]}', '{"classes": [1, 2, 3, 4]}', "no JSON"])
def test_a_record_that_does_not_fit_names_no_class(content, tmp_path, capsys):
    logits, labels = rows(6)
    Predictions(logits, labels, np.arange(6)).save(tmp_path / "predictions.npz")
    (tmp_path / "result.json").write_text(content)
    summary = json.loads(run(capsys, tmp_path, "--json"))
    assert [of_class["name"] for of_class in summary["per_class"]] == ["0", "1", "2", "3"]
    assert all("file" not in row for row in summary["smallest_margins"])
