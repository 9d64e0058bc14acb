"""The one exception a user of the tool is meant to read."""

from collections.abc import Mapping


class LabError(Exception):
    """Something the user can mend; the command line prints its message as one line and stops."""


class NotDone(LabError):
    """Some runs could not be done; ``reasons`` has a sentence for the id of each."""

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = reasons or {}


class RunFailed(NotDone):
    """A run could not be done. The options were right, so this is no usage error."""


def how_to_install(extra: str) -> str:
    return f"pip install 'largemargin[{extra}]', or pip install -e '.[{extra}]' in a clone"
