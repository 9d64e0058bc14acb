"""The one exception a user of the tool is meant to read."""


class LabError(Exception):
    """Something the user can mend; the command line prints its message as one line and stops."""


def how_to_install(extra: str) -> str:
    return f"pip install 'largemargin[{extra}]', or pip install -e '.[{extra}]' in a clone"
