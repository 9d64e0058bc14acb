"""The report of a reproduction, from records made up for it."""

import csv
import dataclasses
import io
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from scipy import stats

from largemargin.lab.paper import cells as paper
from largemargin.lab.paper import figures as paper_figures
from largemargin.lab.paper import lines as paper_lines
from largemargin.lab.paper import page as paper_report
from largemargin.lab.paper.figures import movement
from largemargin.lab.paper.lines import Line, lines_of
from largemargin.lab.paper.page import write
from largemargin.lab.results import RunRecord
from properties import given, st

pytestmark = pytest.mark.xdist_group("paper report")  # one worker writes it
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FULL, REDUCED = paper.SCALES["full"], paper.SCALES["reduced"]
BOUND = math.log(99)
RHO = {"softmax": (3.0, 2.0, 1.5, 1.2, 1.0), "label_smoothing": (3.0, 2.0, 1.5, 2.5, 3.5)}  # the second is every regularised loss's


def record(recipe, error, *, diverged=False, train_error=5.0, share=1.0, symmetry=0.3):
    epochs = [
        {
            "epoch": i + 1,
            "train_loss": None if diverged else 2.0 - 0.1 * i,
            "train_error": train_error,
            "train_rho": None if diverged else rho,
            "gradient_share": share,
            "asymmetry": symmetry,
            "test_error": None if i == 0 else error + 4 - i - (1.5 if i == 3 else 0),  # the best is not the last
        }
        for i, rho in enumerate(RHO.get(recipe.loss, RHO["label_smoothing"]))
    ]
    values = {
        "recipe": recipe.to_dict(),
        "classes": [str(i) for i in range(100)],
        "environment": {
            "largemargin": "0.1",
            "commit": "c" * 40,
            "torch": "2.13",
            "python": "3.12",
            "processor": "a processor",
            "threads": 2,
        },
        "seconds": 100.0,
        "test": {"error": error, "nll": None if diverged else 1.0},
        "validation": None,
        "epochs": epochs,
    }
    return RunRecord.from_dict(values)


def cells(target):
    """Those that the reduced scale has."""
    return [cell for cell in paper.cells(target) if not cell.lacks(REDUCED)]


def entries_of(cells, scale, errors, **fixed):
    """``errors`` has by row those of the first seeds; "x" is a run that diverged."""
    result = []
    for cell in cells:
        recipes = cell.recipes((0, 1, 2), scale, **fixed)
        records = [
            record(recipe, 99.0, diverged=True) if error == "x" else record(recipe, error)
            for recipe, error in zip(recipes, errors.get(cell.row, ()), strict=False)
        ]
        result.append(paper_lines.Entry(cell, recipes, records))
    return result


TABLE_2 = {"softmax": (28.0, 29.0, 29.5), "ours λ=0.3": (27.0, 27.5, 28.2), "LSR λ=0.1": (28.5, "x"), "LSR λ=0.05": ("x", "x", "x")}


@pytest.fixture(scope="module")
def reduced():
    return entries_of(cells("table2"), REDUCED, TABLE_2, processes=2)


def line_of(entries, row, scale=REDUCED) -> Line:
    (line,) = [line for line in lines_of(entries, scale) if line.cell.row == row]
    return line


@pytest.fixture(scope="module")
def out(reduced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    output = io.StringIO()
    console = Console(width=200, file=output)
    write(folder, [*reduced, *entries_of(cells("table3b"), REDUCED, TABLE_2)], REDUCED, "largemargin reproduce table2", console)
    (folder / "console.txt").write_text(output.getvalue())
    return folder


def test_the_same_runs_give_the_same_files(out, reduced, tmp_path):
    entries = [*reduced, *entries_of(cells("table3b"), REDUCED, TABLE_2)]
    write(tmp_path, entries, REDUCED, "largemargin reproduce table2", Console(width=200, file=io.StringIO()))
    written = sorted(path.name for path in tmp_path.iterdir())
    assert any(name.endswith(".svg") for name in written)
    assert [(tmp_path / name).read_bytes() for name in written] == [(out / name).read_bytes() for name in written]


def test_the_interval_is_scipys_of_the_paired_test(reduced):
    full = entries_of(paper.cells("table2"), FULL, TABLE_2, device="cuda")
    line = line_of(full, "ours λ=0.3", FULL)
    expected = stats.ttest_rel(TABLE_2["ours λ=0.3"], TABLE_2["softmax"]).confidence_interval(0.95)
    interval = line.judged.paired.over_seeds
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert line.paper_difference == pytest.approx(27.27 - 28.62)
    assert line.inside == (expected.low <= 27.27 - 28.62 <= expected.high)
    assert line.paper_minus_baseline.endswith("side")
    assert any("contains the paper's difference" in sentence for sentence in paper_report.table_sentences(lines_of(full, FULL)))


def test_the_size_of_a_difference_is_held_against_the_paper_at_full_size_only(out, reduced):
    line = line_of(reduced, "ours λ=0.3")
    assert (line.inside, line.paper_minus_baseline) == (None, "-1.35")
    full = line_of(entries_of(paper.cells("table2"), FULL, TABLE_2), "ours λ=0.3", FULL)
    assert line.judged.paired == full.judged.paired
    for name in ("report.md", "report.html", "console.txt", "report.csv"):
        assert not re.search(r"\b(inside|outside)\b|contains the paper", (out / name).read_text(), re.IGNORECASE)
    assert "The sign of the mean difference" in (out / "report.md").read_text()


def test_table_1_has_differences():
    lines = lines_of(entries_of(paper.cells("table1"), FULL, {"softmax": (28.0, 29.0), "D(q‖u)": (27.0, 27.5)}), FULL)
    assert {line.baseline.cell.name for line in lines if not line.cell.baseline} == {"table1/softmax"}
    assert all((line.judged is not None) == (line.cell.row == "D(q‖u)") for line in lines)
    section = paper_report.section_of("table1", lines)
    assert section.columns[:2] == ["no λ", "λ=0.1"]
    assert section.matrix[0][1][0] is lines[0] and not any(section.matrix[0][1][1:])


def test_every_method_has_a_curve_where_they_are_few():
    errors = {cell.row: (28.0, 29.0) for table in ("table2", "study") for cell in paper.cells(table)}
    for _, (shown, left_out) in paper_figures.settings_of(entries_of(paper.cells("study"), REDUCED, errors)).items():
        assert list(shown) == ["softmax", "label smoothing ε=0.1", "large margin λ=0.3", "large margin λ=1"] and not left_out
        assert all(len(records) == 2 for records in shown.values())
    lines = lines_of(entries_of(paper.cells("table2"), FULL, errors), FULL)
    ((shown, left_out),) = paper_figures.settings_of([line.entry for line in lines]).values()
    assert list(shown) == ["softmax", "label smoothing ε=0.1", "large margin λ=0.3", "super symmetric"]
    assert sorted(left_out) == [f"label smoothing ε={value}" for value in (0.01, 0.05, 0.3)]
    drawings = {drawing.name: drawing for drawing in paper_figures.drawings_of(lines, False)}
    for name in ("fig3", "errors", "symmetry"):
        assert all(label in drawings[name].caption for label in left_out)


def test_fig_3_is_held_against_its_own_losses_only():
    runs = {cell.row: cell.recipes((0,), REDUCED)[0] for cell in paper.cells("study") if cell.column == "clean"}
    _, sentences = paper_figures.rho_drawing({row: [record(runs[row], 28.0)] for row in ("ours λ=0.3", "ours λ=1")})
    assert "agrees with the paper" in sentences[0] and "paper" not in sentences[1]
    for sentence in sentences:
        assert len(set(re.findall(r"epoch \d+", sentence))) == len(re.findall(r"epoch \d+", sentence))


@pytest.mark.parametrize(
    ("table", "texts"),
    [
        ("study", {"clean labels", "30% wrong labels"}),
        ("table3b", {f"{share}% wrong labels" for share in (10, 20, 30, 40, 50)}),
        ("table3a", {f"{share}% of the samples" for share in (50, 60, 70, 80, 90)}),
        ("table2", {""}),
    ],
)
def test_a_column_is_told_in_words(table, texts):
    assert {paper_lines.column_text(cell) for cell in paper.cells(table)} == texts


def test_a_partial_cell_says_how_much_there_is_of_it(reduced):
    assert line_of(reduced, "LSR λ=0.1").runs == "2 of 3 runs"
    missing = line_of(reduced, "LSR λ=0.3")
    assert (missing.ours, missing.runs, missing.verdict, missing.minus_baseline) == ("–", "0 of 3 runs", "–", "–")


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_report_of_one_seed_claims_no_spread(num_seeds, tmp_path):
    errors = {row: (29.9, 28.1)[:num_seeds] for row in ("softmax", "LSR λ=0.1")} | {"ours λ=0.3": (27.7, 27.0)[:num_seeds]}
    entries = entries_of([cell for cell in paper.cells("table2") if cell.row in errors], FULL, errors)
    printed = io.StringIO()
    write(tmp_path, entries, FULL, "largemargin reproduce table2", Console(width=200, file=printed))
    for text in ((tmp_path / "report.md").read_text(), printed.getvalue()):
        assert ("no standard deviation and no interval" in text) == (num_seeds == 1)
        assert ("-2.20 (one seed)" in text) == (num_seeds == 1)
    pictures = (tmp_path / "report.md").read_text()
    assert ("One seed." in pictures, "the span of all seeds" in pictures) == (num_seeds == 1, num_seeds == 2)


def test_runs_that_diverged_are_counted_and_left_out(reduced):
    line = line_of(reduced, "LSR λ=0.1")
    assert line.ours == "28.50 (1 diverged)"
    assert line.minus_baseline == "+0.50 (one seed)"
    assert line.judged is None
    assert line_of(reduced, "LSR λ=0.05").ours == "diverged"


def test_only_the_softmax_of_the_same_column_is_compared_with():
    entries = entries_of(paper.cells("table3b"), FULL, {"softmax": (1.0, 2.0), "ours λ=1": (1.0, 2.0)})
    for line in lines_of(entries, FULL):
        if line.cell.row == "softmax":
            assert line.baseline is None
        else:
            assert line.baseline.cell.column == line.cell.column
    alone = entries_of([cell for cell in paper.cells("table4") if "SVHN" in cell.column or cell.row != "softmax"], FULL, {})
    for line in lines_of(alone, FULL):
        assert (line.baseline is not None) == ("SVHN" in line.cell.column and line.cell.row != "softmax")  # not that of the other data


@given(st.lists(st.floats(0, 5), min_size=3, max_size=40), st.floats(0.01, 1))
def test_a_curve_falls_and_then_rises_where_its_minimum_is_below_both_ends(curve, threshold):
    moves = movement(curve, threshold)
    assert (moves == "falls and then rises") == (curve[0] - min(curve) > threshold and curve[-1] - min(curve) > threshold)
    if moves == "falls":
        assert curve[-1] < curve[0]
    if max(curve) - min(curve) <= threshold:
        assert moves == "stays level"


@pytest.mark.parametrize(
    ("curve", "moves"),
    [
        ((3.0, 2.0, 1.0), "falls"),
        ((3.0, 1.0, 1.05), "falls"),
        ((3.0, 1.0, 1.2), "falls and then rises"),
        ((1.0, 2.0, 3.0), "rises"),
        ((1.0, 3.0, 1.0), "rises and then falls"),
        ((1.0, 1.05, 1.0), "stays level"),
    ],
)
def test_how_a_curve_moves(curve, moves):
    assert movement(curve, paper_figures.TURN * BOUND) == moves


def test_fig_3_is_judged_by_its_curves(out, reduced):
    text = (out / "report.md").read_text()
    assert re.search(r"softmax: ρ̂ falls \(3\.00 .* this agrees with the paper, where it falls\.", text)
    assert re.search(r"large margin λ=0.3: ρ̂ falls and then rises .*lowest 1\.50 nats in epoch 3.* this agrees with", text)
    assert "2% of log(C − 1) = 0.092" in text
    curves = {"softmax": [record(entry.recipes[0], 28.0) for entry in reduced[:1]]}
    for row in curves["softmax"][0].epochs:
        row["train_rho"] = row["epoch"] / 5
    _, sentences = paper_figures.rho_drawing(curves)
    assert "rises" in sentences[0] and "does not agree" in sentences[0]


@pytest.mark.parametrize("changes", [{"label_noise": 0.3}, {"data": "cifar10"}, {"network": "small"}])
def test_fig_3_is_not_held_against_runs_that_it_is_not_of(reduced, changes):
    entry = reduced[0]
    _, sentences = paper_figures.rho_drawing({"softmax": [record(dataclasses.replace(entry.recipes[0], **changes), 28.0)]})
    assert "nats in epoch" in sentences[0] and "paper" not in sentences[0]


def test_a_reduced_study_says_so_at_the_top_and_a_full_one_does_not(out, tmp_path):
    for name in ("report.md", "report.html", "console.txt"):
        text = (out / name).read_text().replace("\n", " ")
        assert "not comparable in level with the paper's" in text.replace("&#39;", "'")[:9000]
    sentences = paper_report.headline(entries_of(paper.cells("table2"), FULL, TABLE_2, device="cuda"), FULL)
    assert "not comparable" not in " ".join(sentences)
    changed = paper_report.headline(entries_of(paper.cells("table2"), FULL, TABLE_2, learning_rate=0.01), FULL)
    assert "not comparable" in " ".join(changed)


def test_the_top_says_what_differs_from_the_scale_that_it_describes(reduced):
    assert not [sentence for sentence in paper_report.headline(reduced, REDUCED) if "Other than" in sentence]
    longer = paper_report.headline(entries_of(cells("table2"), REDUCED, TABLE_2, epochs=50, threads=2), REDUCED)
    assert [sentence for sentence in longer if "Other than" in sentence] == ["Other than at this scale: epochs 50, in place of 15."]


def test_deviations_name_fields_and_the_batch_of_a_process(reduced):
    sentences = " ".join(paper_report.deviation_sentences(reduced))
    assert "All cells: trained for 15 epochs (epochs 15; paper 50)." in sentences
    assert "trained on 20% of the images (train_fraction 0.2; paper 1)." in sentences
    assert "(precision bfloat16; full size float32)" in sentences
    assert "shared by 2 processes, 64 samples each" in sentences
    assert paper_report.deviation_sentences(entries_of(paper.cells("table2"), FULL, TABLE_2)) == []


@pytest.mark.parametrize("target", ["table1", "table2", "table3", "sec3", "study"])
def test_a_command_makes_exactly_its_cell(target):
    fixed = {"learning_rate": 0.05, "decay_all": False, "compile": "a b"}
    for entry in entries_of(cells(target), REDUCED, {}, **fixed):
        words = shlex.split(paper_lines.command_of(entry, REDUCED))
        assert words[:5] == ["largemargin", "reproduce", entry.cell.table, "--cells", entry.cell.name]
        assert words[words.index("--seeds") + 1 : words.index("--scale") + 2] == ["0", "1", "2", "--scale", "reduced"]
        overrides = {word: words[i + 1] for i, word in enumerate(words) if word.startswith("--recipe.")}
        assert overrides == {"--recipe.learning_rate": "0.05", "--recipe.decay_all": "false", "--recipe.compile": "a b"}
        assert words[-2:] == ["--data-root", "DATA"]


def test_the_csv_has_a_line_for_each_cell(out):
    rows = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert len(rows) == len(cells("table2")) + len(cells("table3b"))
    ours = next(row for row in rows if row["cell"] == "table2/ours-0.3")
    assert (ours["paper_mean"], ours["paper_std"], ours["port_mean"], ours["port_std"]) == ("27.27", "0.15", "27.61", "0.09")
    assert float(ours["ours_mean"]) == pytest.approx(sum(TABLE_2["ours λ=0.3"]) / 3, abs=1e-6)
    assert float(ours["ours_mean"]) - float(ours["best_epoch_mean"]) == pytest.approx(0.5)  # the epoch before the last was better
    assert next(row for row in rows if row["cell"] == "table2/lsr-0.3")["ours_mean"] == ""


def test_the_tables_of_the_markdown_are_whole(out):
    tokens = MarkdownIt("commonmark").enable("table").parse((out / "report.md").read_text())
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == 3  # the list of each table, and the matrix of Table 3b
    widths = set()
    for start, kind in enumerate(kinds):
        if kind == "tr_open":
            widths.add(sum(k in ("td_open", "th_open") for k in kinds[start : kinds.index("tr_close", start)]))
    assert widths == {len(paper_lines.COLUMNS), 6}
    assert kinds.count("tr_open") == (1 + len(cells("table2"))) + (1 + 4) + (1 + 20)
    for picture in re.findall(r"\]\((.*?\.svg)\)", (out / "report.md").read_text()):
        assert (out / picture).read_text().startswith("<svg")


def test_cells_that_were_not_run_are_printed_with_their_command(out):
    text = (out / "console.txt").read_text()
    assert "not run yet: largemargin reproduce table2 --cells table2/lsr-0.3 --seeds 0 1 2 --scale reduced --data-root DATA" in text


def test_nothing_run_yet_is_a_report_too(tmp_path):
    write(
        tmp_path, entries_of(paper.cells("table1"), FULL, {}), FULL, "largemargin reproduce table1", Console(file=io.StringIO(), width=60)
    )
    assert "No run is done yet" in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 29
    assert not list(tmp_path.glob("*.svg"))


def test_losses_with_a_hard_maximum_are_told_by_their_training_error():
    recipes = {cell.row: cell.recipes((0,), REDUCED)[0] for cell in paper.cells("sec3")}
    curves = {
        "softmax": [record(recipes["softmax"], 28.0)],
        "hinge": [record(recipes["hinge"], 98.9, train_error=98.5, share=0.02)],
    }
    _, sentences = paper_figures.share_drawing(curves)
    assert "100%" in sentences[0] and sentences[0].endswith(": trained.")
    assert "on average 2%" in sentences[1] and sentences[1].endswith("98.50% (chance 99.00%): not trained.")
    assert paper_figures.share_drawing({"softmax": curves["softmax"]}) is None


def test_who_ends_nearer_to_super_symmetry_is_measured():
    recipes = {cell.row: cell.recipes((0, 1, 2), REDUCED) for cell in paper.cells("fig3")}

    def sentences(ours):
        curves = {"softmax": [record(recipe, 28.0, symmetry=0.3) for recipe in recipes["softmax"]]}
        curves["large margin"] = [record(recipe, 27.0, symmetry=value) for recipe, value in zip(recipes["ours λ=0.3"], ours, strict=True)]
        return paper_figures.symmetry_drawing(curves)[1][1]

    assert sentences((0.1, 0.11, 0.1)).startswith("large margin ends nearer to super-symmetry")
    assert sentences((0.5, 0.51, 0.5)).startswith("large margin ends farther from super-symmetry")
    assert sentences((0.1, 0.31, 0.5)).startswith("These seeds do not tell")
    one = {label: [record(recipes[row][0], 28.0)] for label, row in (("softmax", "softmax"), ("large margin", "ours λ=0.3"))}
    assert paper_figures.symmetry_drawing(one)[1][1].endswith("one seed is no evidence.")


def test_the_page_needs_nothing_from_outside_and_closes_its_tags(out):
    text = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert "<script" not in text
    assert not re.search(r"\b(nan|none)\b", re.sub(r"<svg.*?</svg>|<style.*?</style>", "", text, flags=re.DOTALL).lower())

    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in {"meta", "br"}:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(text)
    assert not checker.open


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium), which is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_a_phone_and_a_desk(out, width, tmp_path):
    # the page itself has no script: this copy measures what was laid out and writes it where --dump-dom shows it
    probe = """<script>
      const svgs = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
      const seen = svgs.every(box => box.width > 200 && box.height > 80 && box.right <= innerWidth);
      document.body.dataset.probe = [svgs.length, seen, document.documentElement.scrollWidth <= innerWidth].join();
    </script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text((out / "report.html").read_text().replace("</body>", probe))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += ["--disable-sync", "--disable-component-update", "--enable-logging=stderr", f"--window-size={width},1600"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    figures = len(list(out.glob("*.svg")))
    assert f'data-probe="{figures},true,true"' in done.stdout
