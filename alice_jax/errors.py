"""The one exception that users see: a mistake they can mend, said in one line."""


class UserError(ValueError):
    """Names the field, its value and the remedy; commands print it without a traceback and exit with 1."""
