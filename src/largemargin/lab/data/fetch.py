"""Put a published data set in place, whole or not at all: every sum is checked before anything is moved there."""

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ..errors import LabError
from .archives import Archive, archives_of, state_of

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte

Progress = Callable[[str, int, int | None], object]  # hears of a file's name, its bytes so far, and of how many


def fetch(data: str, root: Path, mirror: str | None = None, given: Sequence[Path] = (), progress: Progress = lambda *_: None) -> list[str]:
    """Get the files of CIFAR-10, CIFAR-100 or SVHN that are not under ``root``; the names of the archives that were needed.

    They come from the files ``given``, else from ``mirror``, a base address, else from where they are published.
    """
    wanted = [archive for archive in archives_of(data) if set(state_of(archive, root).values()) != {"ok"}]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--data-root {root} cannot be made: {error.strerror}") from error
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as folder:
        for archive in wanted:
            file = Path(folder) / archive.name
            if given:
                _copy(_matching(archive, given), archive, file, progress)
            else:
                _download(_address(archive, mirror), archive, file, progress)
            _put_in_place(archive, file, Path(folder) / "unpacked", root)
            file.unlink(missing_ok=True)
    return [archive.name for archive in wanted]


def _address(archive: Archive, mirror: str | None) -> str:
    if mirror is None:
        return archive.url
    if urllib.parse.urlsplit(mirror).scheme not in ("http", "https"):
        raise LabError(f"--mirror must be an address that begins with http:// or https://, got {mirror!r}; for a file give --from-file")
    return f"{mirror.rstrip('/')}/{archive.name}"


def _matching(archive: Archive, given: Sequence[Path]) -> Path:
    """The file with the archive's name, else the only one."""
    named = [path for path in given if path.name == archive.name]
    if not named and len(given) > 1:
        raise LabError(f"--from-file: none of {', '.join(path.name for path in given)} is {archive.name}, which is needed too")
    return (named or list(given))[0]


def _download(url: str, archive: Archive, file: Path, progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            _store(_chunks(response), url, archive, file, progress, total)
    except urllib.error.HTTPError as error:
        error.close()
        raise LabError(f"cannot download {url}: {error.code} {error.reason}; give --mirror URL or --from-file FILE") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise LabError(f"cannot download {url}: {reason}; give --mirror URL or --from-file FILE") from error


def _copy(source: Path, archive: Archive, file: Path, progress: Progress) -> None:
    try:
        with open(source, "rb") as stream:
            _store(_chunks(stream), str(source), archive, file, progress, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise LabError(f"--from-file {source}: {error.strerror}; expected {archive.name}") from error


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: stream.read(CHUNK), b"")


def _store(chunks: Iterable[bytes], source: str, archive: Archive, file: Path, progress: Progress, total: int | None) -> None:
    """Write ``file``, whose sum must be the archive's."""
    whole = hashlib.md5(usedforsecurity=False)
    size = 0
    progress(archive.name, size, total)
    with open(file, "wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            whole.update(chunk)
            size += len(chunk)
            progress(archive.name, size, total)
    if whole.hexdigest() != archive.md5:
        cut = f", and ends after {size} of {total} bytes" if total is not None and size < total else ""
        raise LabError(
            f"{source} has md5 {whole.hexdigest()}{cut}; {archive.name} is published with {archive.md5}. "
            "Nothing was changed; try again, or another --mirror or --from-file"
        )


def _put_in_place(archive: Archive, file: Path, unpacked: Path, root: Path) -> None:
    """Unpack beside the data root's files, check every member, then move. Of an archive only the files that it is known for are written."""
    if archive.is_tar:
        known = {name for name, _ in archive.members}
        try:
            with tarfile.open(file) as tar:
                for entry in tar:
                    if entry.isfile() and entry.name in known:
                        content = tar.extractfile(entry)
                        assert content is not None
                        (unpacked / entry.name).parent.mkdir(parents=True, exist_ok=True)
                        (unpacked / entry.name).write_bytes(content.read())
        except (tarfile.TarError, OSError, EOFError) as error:
            raise LabError(f"{archive.name} cannot be unpacked: {error}") from error
    else:
        member = unpacked / archive.members[0][0]
        member.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, member)
    wrong = [f"{name} ({state})" for name, state in state_of(archive, unpacked).items() if state != "ok"]
    if wrong:
        raise LabError(f"{archive.name} does not hold what it should: {', '.join(wrong)}. Nothing was changed")
    try:
        for folder in sorted({Path(name).parts[0] for name, _ in archive.members}):
            if not (root / folder).exists():
                os.replace(unpacked / folder, root / folder)
        for name, _ in archive.members:  # where the folder was there: file by file, each whole
            if (unpacked / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked / name, root / name)
    except OSError as error:
        raise LabError(f"{archive.name} cannot be put under {root}: {error.strerror}; is something else of that name there?") from error
    shutil.rmtree(unpacked, ignore_errors=True)
