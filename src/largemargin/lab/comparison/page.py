"""The report of a comparison: one self-contained page with the table and the figures."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import SETS
from ..drawing import color_of
from ..errors import LabError
from ..metrics import ERROR
from ..pages import page
from ..predictions import same_samples
from ..results import Record, RunRecord, TrialRecord, kept, software
from ..run.methods import BASELINE, OF_SOME_LOSSES
from ..run.noise import UNTOLD, phrase_of
from ..run.recipe import Recipe
from ..words import counted
from . import evidence
from .choose import Choice, choice_cells, choice_columns, ties
from .figures import by_loss, class_errors_figure, figures_of, figures_of_trials, lambda_curve, overview, reliability_figure
from .folder import predictions_of
from .own import OwnComparison
from .pictures import Pictures
from .plan import Comparison
from .recommendation import advice, basis, shown
from .table import Row, cells, columns_of, note_of, remarks


@dataclass(frozen=True)
class Picture:
    """A test image that one loss gets right and the other wrong."""

    uri: str
    label: str
    taken_for: str
    sample: str


@dataclass(frozen=True)
class Evidence:
    """What lies behind the difference of a loss and the baseline at one share of label noise."""

    method: str
    class_errors: str  # figures
    reliability: str
    confusions: Sequence[tuple[str, str, str, str]]
    gained: Sequence[Picture]  # images that the method alone gets right
    lost: Sequence[Picture]
    remark: str = ""  # why there are no pictures


def render(
    comparison: Comparison | OwnComparison, out: Path, records: Sequence[Record], rows: Sequence[Row], choices: Sequence[Choice] = ()
) -> tuple[str, str]:
    """The page as HTML that needs nothing from outside, and as Markdown."""
    sections, pictures = [], Pictures(comparison) if isinstance(comparison, Comparison) and comparison.noun == "image" else None
    for noise in dict.fromkeys(row.label_noise for row in rows):
        group = [row for row in rows if row.label_noise == noise]
        of_noise = [record for record in records if record.recipe.noise == noise]
        groups = by_loss(of_noise)
        colors = color_of(list(groups))
        sections.append(
            {
                "noise": phrase_of(noise)[0].upper() + phrase_of(noise)[1:] if noise != UNTOLD else "The losses",
                "legend": [(runs[0].recipe.loss_label, colors[loss]) for loss, runs in groups.items()],
                "rows": [(row, cells(row, group)) for row in group],
                "figures": drawn(kept(of_noise), colors),
                "judged": [row.judged for row in group if row.judged is not None],
                "evidence": evidence_at(pictures, out, of_noise, shown(group), colors),
            }
        )
    first, date = records[0], date_of(records, out)
    known = next((found for record in records if (found := predictions_of(record, out)) is not None), None)
    losses = list(dict.fromkeys(choice.loss for choice in choices))
    content = dict(
        title=comparison.title,
        advice=[*advice(rows), *remarks(records)],
        basis=basis(len(comparison.seeds), first.classes, None if known is None else known.labels, first.num_test, comparison.noun),
        overview=overview(rows),
        sections=sections,
        columns=columns_of(rows),
        note=note_of(rows[0].metric),
        of_logits="margin" in rows[0].others,
        choice=choice_cells(choices),
        choice_columns=choice_columns(choices),
        choice_note=" ".join([*ties(choices), comparison.choice_note]) if choices else "",
        choice_curve=lambda_curve(choices, color_of([BASELINE, *losses])) if choices else "",
        made=made_with(comparison, records, date),
        num_epochs=f"; {first.num_train} training {comparison.noun}s, {first.recipe.epochs} epochs" if isinstance(first, RunRecord) else "",
        command=comparison.command(),
        date=date,
        comparison=comparison,
        num_runs=len(records),
        baseline=BASELINE,
        noun=comparison.noun,
        is_own=isinstance(comparison, OwnComparison),
    )
    return page("report.html.j2", **content), page("report.md.j2", **content)


def drawn(records: Sequence[Record], colors: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The figures of these runs."""
    trials = [record for record in records if isinstance(record, TrialRecord)]
    return figures_of_trials(trials, colors) if trials else figures_of([r for r in records if isinstance(r, RunRecord)], colors)


def made_with(comparison: Comparison | OwnComparison, records: Sequence[Record], date: str) -> list[tuple[str, str]]:
    """How the runs were made: a term and what it was, each."""
    first = records[0]
    seeds = ", ".join(map(str, comparison.seeds))
    made = [
        ("command" if isinstance(comparison, Comparison) else "call", comparison.command()),
        ("date", f"{date}, when the last run ended"),
    ]
    if isinstance(comparison, Comparison) and isinstance(first, RunRecord):
        made += of_data(comparison, first)
        made.append(("seeds", f"{seeds}; a seed fixes weights, order, augmentation, subset and noise, so runs of one seed are pairs"))
    if isinstance(comparison, OwnComparison):
        made.append(("seeds", f"{seeds}; runs of one seed are pairs"))
        made += [("settings", ", ".join(f"{name} = {value}" for name, value in comparison.settings.items()))] if comparison.settings else []
    processor, seconds = first.environment.get("processor", "unknown"), sum(record.seconds for record in records)
    made.append(("software", "; other runs: ".join(software(records))))
    made.append(("hardware", f"{first.recipe.device} ({processor}), {seconds:.0f} s of training in all"))
    return made


FILLED = "missing numbers filled with the median, then standardised, both by the training samples of the run"


def of_data(comparison: Comparison, first: RunRecord) -> list[tuple[str, str]]:
    """What is told of a comparison on a data set."""
    recipe, of_images = first.recipe, comparison.noun == "image"
    pixels = SETS[comparison.data].pixels if recipe.data in SETS and not recipe.streamed else recipe.image_size
    share = f", {100 * recipe.train_fraction:g}% of them all, drawn by the seed" if recipe.train_fraction < 1 else ""
    optimiser = f"SGD, batch {recipe.batch_size}, momentum {recipe.momentum}, weight decay {recipe.weight_decay}, {schedule(recipe)}"
    data = ("images", f"{pixels} × {pixels} pixels, {len(first.classes)} classes") if of_images else ("features", FILLED)
    made = [data, ("network", recipe.network), ("optimiser", optimiser)]
    made += [("augmentation", augmentation(recipe))] if of_images else []
    made += [("other settings", ", ".join(changed(recipe)))] if changed(recipe) else []
    made.append(("training set", f"{first.num_train} {comparison.noun}s{share}"))
    return made


def evidence_at(
    pictures: Pictures | None, out: Path, records: Sequence[Record], row: Row | None, colors: Mapping[str, str]
) -> Evidence | None:
    """Of the runs that the loss of ``row`` and the baseline have in common; None without their predictions."""
    if row is None or row.metric != ERROR:
        return None
    of_loss = {loss: {record.recipe.seed: record for record in kept(runs)} for loss, runs in by_loss(records).items()}
    seeds = sorted(of_loss[row.loss].keys() & of_loss[BASELINE].keys())
    baseline, method = ([predictions_of(of_loss[loss][seed], out) for seed in seeds] for loss in (BASELINE, row.loss))
    theirs, ours = [found for found in baseline if found is not None], [found for found in method if found is not None]
    if len(theirs) < len(seeds) or len(ours) < len(seeds) or not same_samples(theirs + ours):
        return None
    classes = records[0].classes
    pairs = evidence.changed_confusions(theirs, ours)
    gained, lost = evidence.disagreements(theirs, ours) if pictures else ([], [])
    remark = ""
    try:
        uris = pictures.thumbnails(ours[0], [found.index for found in (*gained, *lost)]) if pictures else []
        found_pictures = [
            Picture(uri, classes[found.label], classes[found.taken_for], str(ours[0].ids[found.index]))
            for uri, found in zip(uris, (*gained, *lost), strict=True)
        ]
    except LabError as error:
        found_pictures, remark = [], f"There are no pictures, because {error}."
    label = row.label
    return Evidence(
        method=label,
        class_errors=class_errors_figure(classes, evidence.class_errors(theirs), evidence.class_errors(ours), label, colors[row.loss]),
        reliability=reliability_figure(
            {BASELINE: evidence.reliability(theirs), label: evidence.reliability(ours)},
            {BASELINE: colors[BASELINE], label: colors[row.loss]},
        ),
        confusions=[(classes[p.label], classes[p.predicted], f"{p.baseline:.1f}", f"{p.method:.1f}") for p in pairs],
        gained=found_pictures[: len(gained)],
        lost=found_pictures[len(gained) :],
        remark=remark,
    )


def date_of(records: Sequence[Record], out: Path) -> str:
    """The day on which the last run ended."""
    last = max((out / "runs" / record.recipe.id / "result.json").stat().st_mtime for record in records)
    return datetime.date.fromtimestamp(last).isoformat()


def changed(recipe: Recipe) -> list[str]:
    """The fields of the recipe that are not the defaults and that the page does not tell elsewhere."""
    told = {*OF_SOME_LOSSES, "loss", "seed", "data", "data_root", "data_digest", "network", "train_fraction", "label_noise"}
    told |= {"noise_kind", "unverified", "target"}
    told |= {"epochs", "device", "validation_fraction", "batch_size", "momentum", "weight_decay", "learning_rate"}
    told |= {"augmentation", "crop_padding", "crop_fill", "flip"}
    default, values = Recipe(loss="softmax", seed=0).to_dict(), recipe.to_dict()
    return [f"{name} = {value}" for name, value in values.items() if name not in told and value != default[name]]


def schedule(recipe: Recipe) -> str:
    """The learning rate over the epochs, in words."""
    epochs = counted(recipe.epochs, "epoch")
    start, end = f"learning rate {recipe.learning_rate:g}", f"{recipe.learning_rate * recipe.final_factor:g}"
    match recipe.schedule:
        case "log":
            return f"{start} falling evenly in log scale to {end} over {epochs}"
        case "cosine":
            return f"{start} falling as half a cosine to {end} over {epochs}"
    return f"{start}, times {recipe.step_factor:g} at epochs {', '.join(map(str, recipe.milestones)) or 'none'}, {epochs}"


def augmentation(recipe: Recipe) -> str:
    """What is done to a training image, in words."""
    if recipe.augmentation == "inception":
        return "random resized crops, mirrored half the time, colours and PCA lighting changed"
    fill = "its reflection" if recipe.crop_fill == "reflect" else "the mean of the channel"
    moved = f"moved by up to {counted(recipe.crop_padding, 'pixel')} with {fill} at the border"
    return ", ".join([moved] * (recipe.crop_padding > 0) + ["mirrored half the time"] * recipe.flip) or "none"
