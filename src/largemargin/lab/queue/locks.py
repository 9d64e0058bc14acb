"""One process at a time in a run's folder; the kernel frees the lock of a process that dies."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # file systems that have none


class Lock:
    """The file ``lock`` of ``folder`` while it is held; it is not there when nobody works in the folder."""

    def __init__(self, folder: Path, file: int) -> None:
        self.path, self.file = folder / "lock", file

    @classmethod
    def take(cls, folder: Path) -> "Lock | None":
        """The lock, or None where another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    os.close(file)
                    raise
            # its last holder may have removed it between our open and our lock: then it locks nobody out
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(folder / "lock")):
                    return cls(folder, file)
            os.close(file)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)  # while it is still ours
        with contextlib.suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has the file too
        os.close(self.file)
