"""The one exception that the command line turns into one line and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class UserError(Exception):
    """Something the user gave cannot be used; the message names it and says what is accepted."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, its name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def refusing(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of some kinds into a UserError that names the problem, and what the error says, on one line."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{problem}: {one_line(error)[:600]}") from error


def need(package: str, what: str, extra: str) -> None:
    """Raise a UserError unless the package is there, before it is imported."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}: pip install 'loretta-tt[{extra}]'")
