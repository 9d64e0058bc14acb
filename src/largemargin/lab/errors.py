"""The one exception a user of the tool is meant to read."""


class LabError(Exception):
    """Something the user can mend; the command line prints its message as one line and stops."""


class RunFailed(LabError):
    """A run could not be done. The options were right, so this is no usage error."""


def how_to_install(extra: str) -> str:
    return f"pip install 'largemargin[{extra}]', or pip install -e '.[{extra}]' in a clone"
