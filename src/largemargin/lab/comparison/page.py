"""The report of a comparison: one self-contained page with the table and the figures."""

from collections.abc import Sequence

from ..drawing import color_of
from ..pages import page
from ..results import RunRecord, kept, software
from ..run.methods import BASELINE, OF_SOME_LOSSES
from ..run.recipe import Recipe
from ..words import counted
from .choose import CHOICE_COLUMNS, Choice, choice_cells, choice_note, ties
from .figures import by_loss, figures_of, overview
from .plan import Comparison
from .table import COLUMNS, NOTE, Row, cells, remarks

Records = Sequence[RunRecord]


def render(comparison: Comparison, records: Records, rows: Sequence[Row], choices: Sequence[Choice] = ()) -> str:
    """The page, as HTML that needs nothing from outside."""
    noises = list(dict.fromkeys(row.label_noise for row in rows))
    sections = []
    for noise in noises:
        group = [row for row in rows if row.label_noise == noise]
        of_noise = [record for record in records if record.recipe.label_noise == noise]
        groups = by_loss(of_noise)
        colors = color_of(list(groups))
        figures = figures_of(kept(of_noise), colors)
        legend = [(label_of(group), colors[loss]) for loss, group in groups.items()]
        sections.append({"noise": noise, "legend": legend, "rows": [(row, cells(row)) for row in group], "figures": figures})
    first = records[0]
    return page(
        "report.html.j2",
        headline=[*headline(rows), *remarks(records)],
        overview=overview(rows),
        sections=sections,
        columns=COLUMNS,
        note=NOTE,
        choice=choice_cells(choices),
        choice_columns=CHOICE_COLUMNS,
        choice_note=" ".join([*ties(choices), choice_note(comparison)]),
        changed=changed(first.recipe),
        comparison=comparison,
        first=first,
        recipe=first.recipe,
        schedule=schedule(first.recipe),
        augmentation=augmentation(first.recipe),
        software=software(records),
        num_runs=len(records),
        seconds=sum(record.seconds for record in records),
        baseline=BASELINE,
    )


def changed(recipe: Recipe) -> list[str]:
    """The fields of the recipe that are not the defaults and that the page does not tell elsewhere."""
    told = {*OF_SOME_LOSSES, "loss", "seed", "data", "data_root", "data_digest", "network", "train_fraction", "label_noise"}
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


def headline(rows: Sequence[Row]) -> list[str]:
    """What the table says, in a sentence for each share of label noise."""
    sentences = []
    for noise in dict.fromkeys(row.label_noise for row in rows):
        where = f"With {100 * noise:g}% wrong training labels" if noise else "With the labels as they are"
        compared = [row for row in rows if row.label_noise == noise and row.difference is not None]
        decided = [row for row in compared if row.verdict != "inconclusive"]
        parts = [
            f"{row.label} is {row.verdict} than {BASELINE} by {abs(row.difference.mean):.2f} points"
            for row in sorted(decided, key=lambda row: row.error)
            if row.difference is not None
        ]
        if parts:
            sentences.append(f"{where}, {'; '.join(parts)}.")
        elif compared:
            sentences.append(f"{where}, these seeds do not tell the losses from {BASELINE}.")
    return sentences


def label_of(group: Records) -> str:
    return group[0].recipe.loss_label
