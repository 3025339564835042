"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake in the user's input: one line that names the file, key or row and what to do.

    The command line prints it without a traceback and exits with status 2. Of several processes the first prints it,
    unless `local` says that only the one that raised it has met it.
    """

    local = False
