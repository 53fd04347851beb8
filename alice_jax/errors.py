"""The one exception that users see: a mistake they can mend, said in one line."""


class UserError(ValueError):
    """Names the field, its value and the remedy; commands print it without a traceback and exit with 1."""


class Stalled(UserError):
    """Threads hang, or may for many minutes, that nothing can end: commands leave the process at once."""
