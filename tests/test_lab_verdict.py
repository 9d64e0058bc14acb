"""``largemargin verdict``: finished scores in, the verdicts of the lab's statistics out."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from largemargin.lab import cli, stats
from largemargin.lab.directions import LOWER_IS_BETTER, lower_is_better, room
from largemargin.lab.predictions import Predictions
from largemargin.lab.scores.judge import Overall

pytest.importorskip("jsonargparse", reason="needs jsonargparse, which is not installed, for the command line")

SOFTMAX, MARGIN, SMOOTH = [0.90, 0.91, 0.905, 0.92], [0.931, 0.928, 0.937, 0.945], [0.91, 0.90, 0.907, 0.921]


def rows_of(**methods):
    return [f"{method},{seed},{value}" for method, values in methods.items() for seed, value in enumerate(values)]


def csv_of(rows, header="method,seed,accuracy"):
    return "\n".join([header, *rows]) + "\n"


@pytest.fixture
def judged(tmp_path, capsys):
    """The document of a file of scores, and what was printed."""

    def run(text, *options, baseline="softmax"):
        path = tmp_path / "scores.csv"
        path.write_text(text)
        out = str(tmp_path / "out")
        assert cli.main(["verdict", str(path), "--baseline", baseline, "--json", "--out", out, *options]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """What is said of a file that cannot be judged."""

    def run(text, *options, baseline="softmax"):
        path = tmp_path / "scores.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert cli.main(["verdict", str(path), "--baseline", baseline, "--out", str(tmp_path / "out"), *options]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "out").exists()
        return said

    return run


def verdicts(document):
    return {(row["metric"], row["data_set"], row["method"]): row["verdict"] for row in document["rows"] if row["verdict"]}


@pytest.mark.parametrize(
    "name",
    ["val/loss", "test_error", "ECE %", "logloss", "cv.RMSE", "error (%)", "error_rate", "loss_test", "mse_val", "WER", *LOWER_IS_BETTER],
)
def test_an_error_or_a_loss_is_better_lower(name):
    assert lower_is_better(name)
    assert not lower_is_better(name, higher=[name])


@pytest.mark.parametrize(
    ("name", "mean", "left"),
    [
        ("test_error", 2.5, 2.5),
        ("WER", 0.1, 0.1),
        ("val/accuracy", 0.75, 0.25),
        ("mIoU", 75.0, 25.0),
        ("nll", 0.5, None),  # of densities it can be negative
        ("loss", 0.5, None),
        ("neg_mean_squared_error", -0.5, None),
        ("score", 0.5, None),
        ("error", -1.0, None),  # no error
        ("accuracy", 300.0, None),
    ],
)
def test_the_room_above_a_mean_is_known_of_errors_and_shares(name, mean, left):
    assert room(name, mean, lower_is_better(name)) == left


@pytest.mark.parametrize("name", ["accuracy", "f1", "mIoU", "neg_log_loss", "error_free", "%", "test_neg_mean_squared_error"])
def test_other_metrics_are_better_higher(name):
    assert not lower_is_better(name)
    assert lower_is_better(name, lower=[name])


def test_a_verdict_is_that_of_the_statistics(judged):
    document, _ = judged(csv_of(rows_of(softmax=SOFTMAX, margin=MARGIN, smooth=SMOOTH)))
    expected = {name: stats.paired(np.subtract(values, SOFTMAX)) for name, values in (("margin", MARGIN), ("smooth", SMOOTH))}
    adjusted = dict(zip(expected, stats.holm([found.p for found in expected.values()]), strict=True))
    for row in document["rows"][1:]:
        found, name = expected[row["method"]], row["method"]
        paired = row["judged"]["paired"]
        assert paired["mean"] == pytest.approx(found.mean) and paired["p"] == pytest.approx(found.p)
        assert paired["over_seeds"] == pytest.approx({"low": found.over_seeds.low, "high": found.over_seeds.high})
        assert row["judged"]["adjusted_p"] == pytest.approx(adjusted[name])
    assert verdicts(document) == {("accuracy", "", "margin"): "better", ("accuracy", "", "smooth"): "inconclusive"}


def test_the_page_shows_what_the_command_prints(judged):
    page = (Path(__file__).parent.parent / "docs" / "verdicts.md").read_text()
    scores, table = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("csv", "text"))
    _, said = judged(scores)
    printed = [line.rstrip() for line in said.splitlines() if line.strip()]
    assert [line for line in table.splitlines() if line] == printed[: len([line for line in table.splitlines() if line])]


def test_the_direction_turns_the_verdict_and_is_printed(judged):
    rows = rows_of(softmax=SOFTMAX, margin=MARGIN)
    for header, options, direction, verdict in (
        ("method,seed,accuracy", (), "higher", "better"),
        ("method,seed,accuracy", ("--lower-is-better", "accuracy"), "lower", "worse"),
        ("method,seed,nll", (), "lower", "worse"),
        ("method,seed,nll", ("--higher-is-better", "nll"), "higher", "better"),
    ):
        document, said = judged(csv_of(rows, header), *options)
        assert list(verdicts(document).values()) == [verdict]
        assert f"({direction} is better), 4 seeds" in said


def test_the_order_of_rows_and_columns_changes_nothing(judged):
    rows = [f"{row},{i}" for i, row in enumerate(rows_of(softmax=SOFTMAX, margin=MARGIN))]
    document, _ = judged(csv_of(rows, "method,seed,accuracy,loss"))
    columns = [[row.split(",")[i] for i in (3, 1, 2, 0)] for row in random.Random(0).sample(rows, len(rows))]
    other, _ = judged(csv_of([";".join(row).replace(".", ",") for row in columns], "loss;Seed;accuracy;METHOD"))
    named = [{(row["metric"], row["method"]): row for row in found["rows"]} for found in (document, other)]
    assert named[0] == named[1]


def test_every_verdict_counts_in_the_correction_and_metrics_narrows_it(judged):
    rows = [f"{row},{i % 3}" for i, row in enumerate(rows_of(softmax=SOFTMAX, margin=MARGIN))]
    text = csv_of(rows, "method,seed,accuracy,extra")
    both, _ = judged(text)
    one, _ = judged(text, "--metrics", "accuracy")
    p = both["rows"][1]["judged"]["paired"]["p"]
    assert both["rows"][1]["judged"]["adjusted_p"] == pytest.approx(2 * p)
    assert one["rows"][1]["judged"]["adjusted_p"] == p and list(one["metrics"]) == ["accuracy"]


def power_of(document):
    return next(sentence for sentence in document["rows"][1]["judged"]["sentences"] if "Effect size" in sentence)


def test_no_difference_is_called_detectable_that_no_method_could_reach(judged):
    wide = [softmax + difference for softmax, difference in zip(SOFTMAX, (0.05, -0.05, 0.06, -0.04), strict=True)]
    d = stats.paired(np.subtract(wide, SOFTMAX)).detectable
    assert d > 1 - np.mean(SOFTMAX)
    document, _ = judged(csv_of(rows_of(softmax=SOFTMAX, wide=wide)))
    needed = f"it would have to be {d:.2g} in accuracy, and softmax leaves {1 - np.mean(SOFTMAX):.2g}"
    assert f"With 4 seeds no possible gain would be detected 8 times in 10: {needed};" in power_of(document)
    free, _ = judged(csv_of(rows_of(softmax=SOFTMAX, wide=wide), "method,seed,score"))  # who knows how large it can be
    assert f"With 4 seeds a true difference of {d:.2g} in score would be detected 8 times in 10;" in power_of(free)


def test_power_is_said_to_be_of_one_verdict_where_there_are_several(judged):
    document, _ = judged(csv_of(rows_of(softmax=SOFTMAX, margin=MARGIN, smooth=SMOOTH)))
    assert "would be detected 8 times in 10 before the correction;" in power_of(document)


def over_data_sets(num_data_sets, gain=0.02):
    spread = np.random.default_rng(0).normal(scale=0.002, size=(num_data_sets, 2, 3))
    return [
        f"{method},{seed},{chr(97 + d)},{0.6 + 0.03 * d + gain * is_margin + spread[d, is_margin, seed]:.4f}"
        for d in range(num_data_sets)
        for is_margin, method in enumerate(("softmax", "margin"))
        for seed in range(3)
    ]


def test_several_data_sets_have_a_row_each_and_wilcoxons_verdict(judged):
    document, said = judged(csv_of(over_data_sets(6), "method,seed,data set,accuracy"))
    (overall,) = document["overall"]
    assert len(document["rows"]) == 12 and list(overall["differences"]) == list("abcdef")
    test = scipy_stats.wilcoxon(list(overall["differences"].values()), method="exact")
    assert overall["p"] == overall["adjusted_p"] == pytest.approx(test.pvalue) == 2 / 2**6
    assert overall["verdict"] == "better" and "over 6 data sets (Wilcoxon" in said


def test_the_overall_verdict_goes_by_ranks(judged):
    document, _ = judged(csv_of(over_data_sets(9, gain=0.002), "method,seed,data set,accuracy"))
    (overall,) = document["overall"]
    differences = list(overall["differences"].values())
    assert min(differences) < 0 < max(differences)
    assert overall["p"] == pytest.approx(scipy_stats.wilcoxon(differences, method="exact").pvalue)
    assert overall["p"] != pytest.approx(stats.sign_flip_p(differences))


def test_few_data_sets_cannot_show_a_difference_and_that_is_said(judged):
    document, said = judged(csv_of(over_data_sets(3), "method,seed,dataset,accuracy"))
    (overall,) = document["overall"]
    assert overall["verdict"] == "inconclusive" and overall["p"] == 0.25
    assert "3 data sets allow no p below 0.25, so this test cannot show a difference; from 6 data sets on it can" in said


@pytest.mark.parametrize(("num_verdicts", "needed"), [(1, 6), (2, 7), (4, 8)])
def test_more_verdicts_need_more_data_sets(num_verdicts, needed):
    for n in (needed - 1, needed):
        p = stats.wilcoxon_p(-np.arange(1.0, n + 1))
        found = Overall("a", "b", "error", True, dict.fromkeys(map(str, range(n)), -1.0), p, num_verdicts * p, num_verdicts)
        assert (found.verdict == "better") == (n >= needed) and found.data_sets_needed == needed
        assert ("cannot show" in " ".join(found.sentences())) == (n < needed)


@pytest.mark.parametrize("seed", range(5))
def test_wilcoxons_p_is_scipys_and_knows_ranks_alone(seed):
    d = np.random.default_rng(seed).normal(0.5, size=9)
    assert stats.wilcoxon_p(d) == pytest.approx(scipy_stats.wilcoxon(d, method="exact").pvalue)
    assert stats.wilcoxon_p(d) == stats.wilcoxon_p(d[::-1]) == stats.wilcoxon_p(-d) == stats.wilcoxon_p(d**3)


def test_equal_sizes_share_ranks_and_zeros_count_for_neither_side():
    assert stats.signed_ranks([0.0, 2.0, -2.0, 5.0]).tolist() == [0, 2.5, -2.5, 4]
    assert stats.wilcoxon_p([0.0, 0.0, 0.0]) == 1
    assert abs(stats.signed_ranks([0.91 - 0.89, 0.71 - 0.73, 0.5 - 0.45])).tolist() == [1.5, 1.5, 3]  # 0.02 twice, however they round


OWN = "loss,lam,seed,test_error,test_rho,seconds,diverged"
OWN_ROWS = [
    f"{loss},{'' if loss == 'softmax' else 0.3},{seed},{error},{0.1 * seed},12.5,"
    for loss, errors in (("softmax", [9.0, 9.4, 9.1, 9.9]), ("large_margin", [8.1, 8.4, 8.3, 8.8]))
    for seed, error in enumerate(errors)
]
OF_IMAGES = (
    "data,network,loss,lam,label_noise,noise_kind,long_tail,train_fraction,seed,epochs,test_error,test_nll,train_error,seconds,diverged"
)


def of_images(noise=0.0, data="cifar10", kind=""):
    return [
        f"{data},small,{loss},,{noise},{kind},1,1,{seed},3,{error + seed % 3 / 10},{0.4 + seed % 2 / 50},0.1,8.1,"
        for loss, error in (("softmax", 9.0), ("large_margin", 8.0))
        for seed in range(4)
    ]


def test_the_results_of_a_comparison_are_read_as_they_are(judged):
    document, said = judged(csv_of(OWN_ROWS, OWN))
    assert list(document["metrics"]) == ["test_error"] and verdicts(document) == {("test_error", "", "large_margin"): "better"}
    assert "its loss is the method, and test_error is judged; --metrics names others (test_rho)" in said
    expected = stats.paired(np.subtract([8.1, 8.4, 8.3, 8.8], [9.0, 9.4, 9.1, 9.9]))
    assert document["rows"][1]["judged"]["adjusted_p"] == pytest.approx(expected.p)
    both, said = judged(csv_of(OWN_ROWS, OWN), "--metrics", "test_error", "test_rho")
    assert both["metrics"] == {"test_error": "lower is better", "test_rho": "lower is better"} and "is the method" not in said


def test_the_results_of_images_are_of_their_data_set(judged):
    document, _ = judged(csv_of([*of_images(), *of_images(data="svhn")], OF_IMAGES))
    assert {row["data_set"] for row in document["rows"]} == {"cifar10", "svhn"} and list(document["metrics"]) == ["test_error"]


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ([*OWN_ROWS[:-1], OWN_ROWS[-1] + "its numbers are not finite"], OWN, "line 9: this run diverged (its numbers are not finite)"),
        ([*of_images(), *of_images(0.2)], OF_IMAGES, "its label noise is 0.0 and 0.2; keep the rows of one kind and share"),
        (
            [*of_images(0.2), *of_images(0.2, kind="human")],
            OF_IMAGES,
            "its label noise is 0.2 and 0.2 human; keep the rows of one kind and share",
        ),
        ([row.replace(",12.5,", ",12.5") for row in OWN_ROWS], OWN.replace(",diverged", ""), "expected one column method"),
    ],
)
def test_results_that_are_no_scores_are_refused(refused, rows, header, says):
    assert says in refused(csv_of(rows, header))


def test_a_file_with_a_method_may_have_a_metric_of_any_name(judged):
    document, _ = judged(
        csv_of([f"{row},1,2,3" for row in rows_of(softmax=SOFTMAX, margin=MARGIN)], "method,seed,loss,seconds,test_a,diverged")
    )
    assert list(document["metrics"]) == ["loss", "seconds", "test_a", "diverged"]


def written_by_compare(tmp_path):
    from largemargin.lab.comparison.table import results_csv
    from largemargin.lab.results import TrialRecord
    from largemargin.lab.trial.trial import Trial

    records = [
        TrialRecord(Trial(loss, seed, word=loss), {"f1": 0.5 + 0.1 * (loss == "large_margin") + 0.01 * seed, "loss": 1.0}, seconds=1.0)
        for loss in ("softmax", "large_margin")
        for seed in range(3)
    ]
    return results_csv(records)


def test_the_command_reads_what_a_comparison_writes(judged, tmp_path):
    document, _ = judged(written_by_compare(tmp_path))
    assert document["metrics"] == {"test_f1": "higher is better"} and [row["n"] for row in document["rows"]] == [3, 3]


GOOD = rows_of(softmax=SOFTMAX, margin=MARGIN)


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ([*GOOD, "margin,3,0.9"], None, "line 9 and line 10 are both of method margin, seed 3; each run must come once"),
        (["softmax,0,0.9", "margin,0,0.91"], None, "has 1 seed (0), and a difference without its spread over seeds shows nothing"),
        (GOOD[:-1], None, "method margin has no run of seed 3, and method softmax has one (line 5); runs are compared in pairs"),
        (GOOD[1:], None, "method softmax has no run of seed 0, and method margin has one (line 5)"),
        ([*GOOD, "margin,4,nan", "softmax,4,0.9"], None, "line 10, column accuracy: got nan, expected a finite number"),
        ([*GOOD, "margin,4,", "softmax,4,0.9"], None, "line 10, column accuracy: got an empty cell, expected a number"),
        ([*GOOD, "margin,4,93%", "softmax,4,0.9"], None, "line 10, column accuracy: got '93%', expected a number"),
        ([*GOOD, "margin,4,1_0", "softmax,4,0.9"], None, "line 10, column accuracy: got '1_0', expected a number"),
        ([*GOOD, "margin,1_0,0.9"], None, "line 10, column seed: got '1_0', expected a whole number"),
        ([*GOOD, "margin,four,0.9"], None, "line 10, column seed: got 'four', expected a whole number"),
        ([*GOOD, "margin,,0.9"], None, "line 10, column seed: got '', expected a whole number"),
        ([*GOOD, ",4,0.9"], None, "line 10, column method: it is empty"),
        ([*GOOD, "margin,4"], None, "line 10: it has 2 values, and the header names 3 columns"),
        (GOOD, "name,seed,accuracy", "line 1: expected one column method (the name of what is compared), got 0 among name, seed, accuracy"),
        (GOOD, "method,Seeds,accuracy", "expected one column seed (a whole number), got 0 among method, Seeds, accuracy"),
        (GOOD, "method,seed,", "line 1: column 3 has no name, as the index that pandas writes"),
        (GOOD, "method,seed,seed", "two columns are called seed"),
        (["softmax,0", "margin,0"], "method,seed", "there is no metric beside method, seed"),
        (GOOD[:4], None, "has no method but the baseline softmax"),
        ([], None, "has a header and no rows"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(refused, rows, header, says):
    said = refused(csv_of(rows, header or "method,seed,accuracy"))
    assert says in said and "scores.csv" in said


@pytest.mark.parametrize(
    ("text", "says"), [("", "is empty"), (b"\xff\xfe\x00", "is not a text file in UTF-8"), ('method,seed,a\n"', "is not a CSV file")]
)
def test_what_is_no_table_is_refused(refused, text, says):
    assert says in refused(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--lower-is-better", "f1"), "--lower-is-better f1 is not one of the metrics, accuracy"),
        (("--lower-is-better", "accuracy", "--higher-is-better", "accuracy"), "both name accuracy"),
        (("--metrics", "f1"), "--metrics f1 is not a metric of"),
        (("--predictions", "softmax=a.npz"), "and --predictions were both given"),
    ],
)
def test_a_wrong_option_is_named(refused, options, says):
    assert says in refused(csv_of(GOOD), *options)


def test_an_unknown_baseline_is_refused_with_the_methods_that_there_are(refused):
    assert "--baseline plain is not a method of" in refused(csv_of(GOOD), baseline="plain")
    assert "which has softmax, margin" in refused(csv_of(GOOD), baseline="plain")


def test_a_missing_file_and_a_missing_baseline_are_named(tmp_path, capsys):
    assert cli.main(["verdict", str(tmp_path / "none.csv"), "--baseline", "a", "--out", str(tmp_path / "out")]) == 2
    assert "none.csv cannot be read" in capsys.readouterr().err
    (tmp_path / "scores.csv").write_text(csv_of(GOOD))
    assert cli.main(["verdict", str(tmp_path / "scores.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "--baseline is missing: name the method" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "scores.csv").write_text(csv_of(GOOD))
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    assert cli.main(["verdict", str(tmp_path / "scores.csv"), "--baseline", "softmax", "--out", str(out)]) == 2
    assert "holds files that are not of a verdict" in capsys.readouterr().err
    assert (out / "report.html").read_text() == "mine"


def test_a_verdict_takes_the_place_of_an_earlier_one_and_says_so(tmp_path, capsys):
    out = tmp_path / "out"
    for name, rows in (("first", GOOD), ("second", rows_of(softmax=SOFTMAX, smooth=SMOOTH))):
        (tmp_path / f"{name}.csv").write_text(csv_of(rows))

    def of(name):
        assert cli.main(["verdict", str(tmp_path / f"{name}.csv"), "--baseline", "softmax", "--out", str(out)]) == 0
        return capsys.readouterr().out

    assert "this one replaces it" not in of("first")
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "this one replaces it" not in of("first") and {path: path.read_bytes() for path in out.iterdir()} == before
    assert f"{out} held the verdict on {tmp_path / 'first.csv'} (baseline softmax); this one replaces it" in of("second")
    assert (out / "notes.txt").read_text() == "mine" and "smooth" in (out / "report.md").read_text()


def test_the_folder_of_a_comparison_and_a_file_are_left_alone(tmp_path, capsys):
    (tmp_path / "scores.csv").write_text(csv_of(GOOD))
    folder = tmp_path / "comparison"
    folder.mkdir()
    (folder / "compare.json").write_text('{"largemargin": "compare"}')
    (folder / "results.csv").write_text("mine")
    for out, says in ((folder, "holds files that are not of a verdict"), (tmp_path / "scores.csv", "is a file, not a folder")):
        assert cli.main(["verdict", str(tmp_path / "scores.csv"), "--baseline", "softmax", "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    assert (folder / "results.csv").read_text() == "mine" and len(list(folder.iterdir())) == 2


def test_the_report_is_whole_in_itself_and_safe(judged, tmp_path):
    rows = [row.replace("margin", "<script>|*") for row in over_data_sets(6)]
    judged(csv_of(rows, "method,seed,data set,accuracy"))
    html, markdown = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<script" not in html and not re.findall(r'(?:src|href)="(?!#)', html)
    assert "Demšar" in html and "Demšar" in markdown and html.count("<svg") == 1
    assert r"<script>\|\*" in markdown
    results = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert len(results) == 13 and {line.count(",") for line in results} == {12}


@pytest.fixture
def predictions(tmp_path):
    """Folders with predictions of two methods: each seed is a draw about the same samples, and margin is better."""
    generator = np.random.default_rng(0)
    labels, easy = np.arange(200) % 4, generator.normal(1.0, 1.0, 200)
    files = {}
    for method, gain in (("softmax", 0.0), ("margin", 0.8)):
        for seed in range(3):
            logits = generator.normal(size=(200, 4)).astype(np.float32)
            logits[np.arange(200), labels] += (easy + gain).astype(np.float32)
            files[method, seed] = tmp_path / f"{method}{seed}.npz"
            Predictions(logits, labels, np.arange(200)).save(files[method, seed])
    return files


def of_predictions(capsys, tmp_path, files, *options):
    words = [word for method in ("softmax", "margin") for word in (f"{method}=", *(str(files[method, seed]) for seed in range(3)))]
    assert cli.main(["verdict", "--baseline", "softmax", "--predictions", *words, "--out", str(tmp_path / "out"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_predictions_are_judged_over_seeds_and_test_samples(predictions, tmp_path, capsys):
    rows = of_predictions(capsys, tmp_path, predictions)
    wrong = {
        method: np.array([np.load(predictions[method, seed])["predicted"] != np.arange(200) % 4 for seed in range(3)])
        for method in ("softmax", "margin")
    }
    expected = stats.paired(
        100 * (wrong["margin"].mean(1) - wrong["softmax"].mean(1)), 100 * (wrong["margin"].astype(float) - wrong["softmax"])
    )
    found = rows[1]["judged"]["paired"]
    assert (rows[1]["metric"], rows[1]["verdict"]) == ("error %", "better")
    assert found["mean"] == pytest.approx(expected.mean)
    assert found["over_seeds_and_samples"]["low"] == pytest.approx(expected.over_seeds_and_samples.low)


def test_any_file_of_logits_and_labels_is_a_prediction(predictions, tmp_path, capsys):
    before = of_predictions(capsys, tmp_path, predictions)
    for path in predictions.values():
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("logits", "labels")}
        np.savez(path, **arrays)
    assert of_predictions(capsys, tmp_path, predictions) == before


def test_seeds_with_other_test_samples_are_compared_over_seeds_alone(predictions, tmp_path, capsys):
    for method in ("softmax", "margin"):
        found = Predictions.load(predictions[method, 2])
        Predictions(found.logits[::-1], found.labels[::-1], found.ids[::-1]).save(predictions[method, 2])
    rows = of_predictions(capsys, tmp_path, predictions)
    assert rows[1]["judged"]["paired"]["over_seeds_and_samples"] is None
    assert "because the test samples of the seeds differ." in rows[1]["judged"]["sentences"][1]


def test_a_pair_needs_the_same_samples_and_each_method_as_many_files(predictions, tmp_path, capsys):
    files = {key: str(path) for key, path in predictions.items()}
    command = ["verdict", "--baseline", "softmax", "--out", str(tmp_path / "out"), "--predictions"]
    for words, says in (
        ([f"softmax={files['softmax', 0]}", files["softmax", 1], f"margin={files['margin', 0]}"], "softmax has 2 files, and margin has 1"),
        ([files["softmax", 0]], "expected method=FILE"),
        (["softmax="], "--predictions softmax= has no file"),
        (["softmax=a.npz", "softmax=b.npz"], "softmax comes twice"),
        ([f"=lost{files['softmax', 0]}"], "the name of the method is missing"),
    ):
        assert cli.main([*command, *words]) == 2
        assert says in capsys.readouterr().err
    found = Predictions.load(predictions["margin", 1])
    Predictions(found.logits[::-1], found.labels[::-1], found.ids).save(predictions["margin", 1])
    words = [word for method in ("softmax", "margin") for word in (f"{method}=", *(files[method, seed] for seed in range(3)))]
    assert cli.main([*command, *words]) == 2
    assert "are a pair, and their test samples differ" in capsys.readouterr().err


def test_runs_of_different_seeds_are_no_pair(predictions, tmp_path, capsys):
    files = {}
    for (method, seed), path in predictions.items():
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir()
        path.rename(folder / "predictions.npz")
        (folder / "result.json").write_text(json.dumps({"recipe": {"seed": seed}}))
        files[method, seed] = str(folder)
    words = ["softmax=", *(files["softmax", i] for i in (0, 1, 2)), "margin=", *(files["margin", i] for i in (0, 2, 1))]
    assert cli.main(["verdict", "--baseline", "softmax", "--out", str(tmp_path / "out"), "--predictions", *words]) == 2
    assert "has seed 1, and its pair" in capsys.readouterr().err


def test_a_broken_record_of_a_run_is_named(predictions, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    predictions["margin", 0].rename(folder / "predictions.npz")
    (folder / "result.json").write_text("{")
    words = ["softmax=", str(predictions["softmax", 0]), "margin=", str(folder)]
    assert cli.main(["verdict", "--baseline", "softmax", "--out", str(tmp_path / "out"), "--predictions", *words]) == 2
    assert "result.json is not the record of a run" in capsys.readouterr().err
