"""Errors that are meant for the user."""


class PokegemmaError(Exception):
    """What the user did wrong, in one line: what, where, the value, what to do. Scripts exit with `exit_code`."""

    exit_code = 2


class CheckFailedError(PokegemmaError):
    """The input could be read, but a check on it failed."""

    exit_code = 1
