"""The one exception that a user's mistake raises, and the exit status of work that met damage."""

DAMAGED = 3
"""exit status where all was done, and a damaged checkpoint was met and told"""


class UserError(Exception):
    """A mistake in the user's input: one line that names the file, key or row and what to do.

    The command line prints it without a traceback and exits with status 2. Of several processes the first prints it,
    unless `local` says that only the one that raised it has met it.
    """

    local = False


def first_line(error: BaseException) -> str:
    """First line of an error's message; the name of its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
