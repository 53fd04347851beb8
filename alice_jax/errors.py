"""The one exception that users see: a mistake they can mend, said in one line."""


class UserError(ValueError):
    """Names the field, its value and the remedy; commands print it without a traceback and exit with 1."""


def check_at_least(least: int, name: str, value: int) -> None:
    """Refuses a number below the least one that the field or flag of this name may have.

    >>> check_at_least(1, "--pairs", 0)
    Traceback (most recent call last):
    alice_jax.errors.UserError: --pairs 0: give a whole number of 1 or more
    """
    if value < least:
        raise UserError(f"{name} {value}: give a whole number of {least} or more")


class Stalled(UserError):
    """Threads hang, or may for many minutes, that nothing can end: commands leave the process at once."""
