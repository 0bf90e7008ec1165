"""The command line, its tiny model, its tokenizer and a text."""

from tests.cli.conftest import book, llama, loretta, tokenizer  # noqa: F401
