"""The command line's tiny model and text."""

from tests.cli.conftest import book, tokenizer  # noqa: F401
