"""What a folder of images holds beside the images that are read: counted, so that nothing is left out unsaid."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ..words import counted

SHOWN = 10  # classes named; the others are counted
USUAL = {".ds_store", "thumbs.db", "desktop.ini"}  # which file managers leave everywhere


def walk(folder: Path, is_image: Callable[[str], bool]) -> tuple[list[str], Counter[str]]:
    """The names of the images in a folder and the folders in it, in a fixed order, and what else is there, counted by its kind."""
    found: list[str] = []
    skipped: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        hidden = [name for name in folders if name.startswith(".") and name not in linked]
        skipped["linked folder, not followed"] += len(linked)
        skipped["hidden folder"] += len(hidden)
        folders[:] = [name for name in folders if name not in linked and name not in hidden]
        prefix = os.path.relpath(place, folder)
        for name in files:
            if name.startswith("."):
                skipped["hidden file"] += name.lower() not in USUAL
            elif is_image(name):
                found.append(name if prefix == "." else os.path.join(prefix, name))
            elif name.lower() not in USUAL:
                skipped[os.path.splitext(name)[1].lower() or "file without a suffix"] += 1
    return sorted(found, key=lambda name: name.split(os.sep)), +skipped


def beside(folder: Path, used: Collection[str]) -> str:
    """What stands in a folder beside the folders that are used: ``val/, 2 files``; an empty string where there is nothing."""
    others = [entry for entry in sorted(folder.iterdir()) if entry.name not in used and entry.name.lower() not in USUAL]
    folders = [f"{entry.name}/" for entry in others if entry.is_dir()]
    files = sum(not entry.is_dir() and not entry.name.startswith(".") for entry in others)
    rest = [counted(len(folders) - SHOWN, "more folder")] if len(folders) > SHOWN else []
    return ", ".join([*folders[:SHOWN], *rest, *([counted(files, "file")] if files else [])])


def lines_of(skipped: Mapping[str, Counter[str]], read: Mapping[str, int]) -> list[str]:
    """A line for each class folder in which something was left out, by its place under the folder."""
    lines = [f"{place}: {counted(read[place], 'image')} read, left out: {amounts(kinds)}" for place, kinds in skipped.items() if kinds]
    rest = Counter[str]()
    for kinds in list(kinds for kinds in skipped.values() if kinds)[SHOWN:]:
        rest += kinds
    return lines[:SHOWN] + ([f"and in {counted(len(lines) - SHOWN, 'more class folder')}: {amounts(rest)}"] if rest else [])


def amounts(kinds: Counter[str]) -> str:
    """``25 .heic, 1 linked folder``, the most frequent first."""
    return ", ".join(_amount(count, kind) for kind, count in kinds.most_common())


def _amount(count: int, kind: str) -> str:
    many = count > 1 and not kind.startswith(".")  # a suffix has no plural
    return f"{count} {kind.replace('file', 'files').replace('folder', 'folders') if many else kind}"
