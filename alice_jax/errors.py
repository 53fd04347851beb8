"""The one exception that users see: a mistake they can mend, said in one line."""


class UserError(ValueError):
    """Names the field, its value and the remedy; commands print it without a traceback and exit with 1."""


class Stalled(UserError):
    """Something hangs in a thread that nothing can end, so that the process must be left at once."""
