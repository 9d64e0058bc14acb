"""``largemargin verdict``: intervals, tests and a report for runs that were made anywhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..arguments.options import path_of
from ..errors import LabError
from ..predictions import NAME, Predictions
from ..scores import page, table
from ..scores.judge import judge, overall
from ..scores.page import Verdicts
from ..scores.predicted import Outcome, scores_of
from ..scores.runs import Scores, collected
from .screen import print_json


def run(options: Any, console: Console) -> None:
    out = path_of(options.out)
    earlier = page.earlier(out)
    scores = given_scores(options, console)
    lines = judge(scores, options.lower_is_better or (), options.higher_is_better or ())
    lower = {line.metric: line.judged.lower_is_better for line in lines if line.judged is not None}
    verdicts = Verdicts(scores, lines, overall(lines), lower)
    page.print_verdicts(verdicts, console)
    if earlier is not None and page.subject(earlier) != page.subject(page.as_json(verdicts)):
        held = f"{out} held the verdict on {earlier['scores']} (baseline {earlier['baseline']}); this one replaces it"
        console.print(held, markup=False, highlight=False, soft_wrap=True)
    page.write(verdicts, out)
    console.print(f"{out / 'report.html'}  the same with a figure; results.csv has the tables", markup=False, highlight=False)
    if options.json:
        print_json(page.as_json(verdicts) | {"out": str(out)})


def given_scores(options: Any, console: Console) -> Scores:
    """From the file of scores, or from predictions."""
    if (options.scores is None) == (options.predictions is None):
        both = "and --predictions were both given" if options.scores is not None else "or --predictions is needed"
        raise LabError(f"a file of scores {both}; give one of the two")
    if options.scores is not None:
        path = path_of(options.scores)

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        return collected(str(path), options.baseline, table.read(path, options.metrics or (), say))
    if options.metrics:
        raise LabError("--metrics is for a file of scores, and --predictions gives the error alone; leave it out")
    found, no_samples = scores_of({method: [_outcome(path) for path in paths] for method, paths in by_method(options.predictions).items()})
    return collected("predictions", options.baseline, found, no_samples)


def by_method(groups: Sequence[Sequence[str]]) -> dict[str, list[Path]]:
    """The files of each method, from ``method=FILE FILE ...``; the first file may be left to the next word, which a shell expands."""
    found: dict[str, list[Path]] = {}
    for word in (word for group in groups for word in group):
        method, equals, file = word.partition("=")
        if equals and "/" not in method:
            if not method or method in found:
                raise LabError(f"--predictions {word}: " + (f"{method} comes twice" if method else "the name of the method is missing"))
            found[method] = [path_of(file)] if file else []
        elif not found:
            raise LabError(f"--predictions {word}: expected method=FILE, softmax={word} say")
        else:
            found[list(found)[-1]].append(path_of(word))
    for method, paths in found.items():
        if not paths:
            raise LabError(f"--predictions {method}= has no file; give one a seed")
    return found


def _outcome(path: Path) -> Outcome:
    """What a file of logits, or the folder of a run, gets wrong."""
    from ..logits import files, summary  # they import torch, which a file of scores does not need

    path = summary.file_of(path)
    if path.name == NAME:
        known = Predictions.load(path)
        return Outcome(str(path), known.labels, known.wrong, known.ids, seed_of(path.parent))
    labelled = files.read(path)
    return Outcome(str(path), labelled.labels, labelled.logits.argmax(1) != labelled.labels, labelled.files)


def seed_of(folder: Path) -> int | None:
    """The seed of the run whose folder this is; None if the folder has no record of a run."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        return int((record.get("recipe") or record["trial"])["seed"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabError(f"{path} is not the record of a run ({error!r}), so its seed is unknown; mend or remove it") from error
