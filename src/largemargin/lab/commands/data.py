"""``largemargin data``: which data sets are here, whether they are whole, and getting them."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..arguments.options import path_of
from ..data import ARCHIVED, STREAMED, human_labels
from ..data.archives import archives_by_hand, archives_of, state_of
from ..data.fetch import fetch
from ..data.folders import streamed_set
from ..errors import LabError
from ..words import counted

HUMAN_LABELS = "cifar100n"


def run(options: Any, console: Console) -> None:
    root = path_of(options.data_root)
    if options.name == HUMAN_LABELS:
        _human_labels(options, root, console)
        return
    names = (*ARCHIVED, *STREAMED)
    if options.name is not None and options.name not in names:
        raise LabError(f"data {options.action}: unknown data set {options.name!r}; give one of {' '.join([*names, HUMAN_LABELS])}")
    if options.action != "fetch" and (options.mirror or options.from_file):
        raise LabError(f"--mirror and --from-file are for data fetch, not data {options.action}")
    chosen = names if options.name is None else (options.name,)
    if options.action == "list":
        _list(chosen, root, console)
    elif options.action == "verify":
        _verify(chosen, root, console, asked=options.name is not None)
    else:
        _fetch(options, root, console)


def _human_labels(options: Any, root: Path, console: Console) -> None:
    """The labels of CIFAR-100N, which are beside CIFAR-100 and no data set of their own."""
    if options.action == "fetch":
        if options.mirror or len(options.from_file or ()) != 1:
            raise LabError(f"data fetch {HUMAN_LABELS} needs --from-file CIFAR-100_human.pt: its owners give it out ({human_labels.TERMS})")
        human_labels.put(path_of(options.from_file[0]), root)
        console.print(f"{HUMAN_LABELS}: checked and put under {root}; terms: {human_labels.TERMS}", markup=False, highlight=False)
        return
    state = human_labels.state(root)
    console.print(f"{HUMAN_LABELS}: {human_labels.FILE}: {state}", markup=False, highlight=False)
    if options.action == "verify" and state != "ok":
        raise LabError(
            f"{human_labels.FILE} ({state}) under --data-root {root}; get it: largemargin data fetch {HUMAN_LABELS} --from-file FILE"
        )


def _list(names: tuple[str, ...], root: Path, console: Console) -> None:
    table = Table("data set", "file", "md5", f"under {escape(str(root))}")
    for name in names:
        if name in ARCHIVED:
            for archive in archives_of(name):
                there = [(root / member).is_file() for member, _ in archive.members]
                state = "present" if all(there) else "in part" if any(there) else "missing"
                table.add_row(name, archive.name, archive.md5, state)
        else:
            there = [(root / name / part).is_dir() for part in ("train", "val")]
            state = "present" if all(there) else "in part" if any(there) else "missing"
            for file, md5 in archives_by_hand(name):
                table.add_row(name, file, md5, state)
    console.print(table)


def _verify(names: tuple[str, ...], root: Path, console: Console, asked: bool) -> None:
    seen, wrong = [], []
    for name in names:
        if name in ARCHIVED:
            states = {member: state for archive in archives_of(name) for member, state in state_of(archive, root).items()}
            if not asked and set(states.values()) == {"missing"}:
                continue
            for member, state in states.items():
                console.print(f"{name}: {member}: {state}", markup=False, highlight=False)
            wrong += [f"{member} ({state})" for member, state in states.items() if state != "ok"]
        elif asked or (root / name).is_dir():
            files = streamed_set(name, root)
            held_out = counted(len(files.test_files), "validation image")
            counts = f"{len(files.train_files)} training and {held_out} of {len(files.classes)} classes"
            for note in files.notes:
                console.print(f"{name}: {note}", markup=False, highlight=False)
            console.print(f"{name}: {counts}; images carry no md5 of their own", markup=False, highlight=False)
        else:
            continue
        seen.append(name)
    if wrong:
        raise LabError(
            f"{', '.join(wrong)} under --data-root {root}; get what is wrong again: largemargin data fetch NAME --data-root {root}"
        )
    if not seen:
        raise LabError(f"no data set under --data-root {root}; point --data-root at them, or get one: largemargin data fetch NAME")


def _fetch(options: Any, root: Path, console: Console) -> None:
    name = options.name
    if name is None:
        raise LabError(f"data fetch needs the NAME of a data set: {' '.join(ARCHIVED)}")
    if options.mirror is not None and options.from_file is not None:
        raise LabError("--mirror and --from-file say two places; give one of them")
    if name not in ARCHIVED:
        archives = " and ".join(file for file, _ in archives_by_hand(name))
        raise LabError(
            f"{name} is given out by its owners under their terms: unpack {archives} as {root / name}/train/CLASS/*.jpg and "
            f"{root / name}/val/CLASS/*.jpg, then largemargin data verify {name}"
        )
    given = [path_of(file) for file in options.from_file or ()]
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bars:
        tasks: dict[str, Any] = {}

        def progress(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(escape(file), total=total)
            bars.update(tasks[file], completed=done)

        needed = fetch(name, root, options.mirror, given, progress)
    done = f"{', '.join(needed)} checked and put" if needed else "already whole"
    console.print(f"{name}: {done} under {root}", markup=False, highlight=False)
