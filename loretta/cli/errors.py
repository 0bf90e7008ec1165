"""The one exception that the command line turns into one line and exit code 2."""


class UserError(Exception):
    """Something the user gave cannot be used; the message names it and says what is accepted."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, its name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
