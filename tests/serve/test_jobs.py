"""The text of a job as its tokens come: whole characters, nothing of a stop, everything at the end."""

from __future__ import annotations

import pytest

from loretta.serve.batching import Job


def decode(tokens: list[int]) -> str:
    """One token a byte."""
    return bytes(tokens).decode("utf-8", "replace")


def pieces(text: bytes, ends: bool = False, **options: object) -> list[tuple[str, object]]:
    """What a job emits whose tokens are these bytes and, where it `ends`, the end token."""
    found: list[tuple[str, object]] = []
    job = Job([1], None, len(text) + ends, found.append, **options)
    for token in text:
        if not job.ended:
            job.push(token, False, decode)
    if ends:
        job.push(0, True, decode)
    assert job.ended
    return found


@pytest.mark.parametrize("text", ["plain", "Zürich", "日本語", "a👍🏽b", ""])
def test_characters_come_whole(text: str) -> None:
    found = pieces(text.encode(), ends=True)
    assert "".join(piece for piece, _ in found) == text
    assert not any("\ufffd" in piece for piece, _ in found)
    assert [reason for _, reason in found] == [None] * (len(found) - 1) + ["stop"]
    assert len(found) == len(text) + 1


def test_a_character_that_stays_half_comes_at_the_end() -> None:
    assert pieces("ü".encode()[:1]) == [("\ufffd", "length")]
    assert "".join(piece for piece, _ in pieces(b"\xffab\xc3" + "é".encode())) == decode(b"\xffab\xc3" + "é".encode())


def test_nothing_of_a_stop_is_emitted() -> None:
    assert pieces(b"one two three", stop=["two"]) == [*((letter, None) for letter in "one "), ("", "stop")]
    assert pieces(b"abcabd..", stop=["abd", "x"]) == [("abc", None), ("", "stop")]
    assert pieces(b"ab", stop=["abc"]) == [("ab", "length")]
    assert pieces(b"a then", stop=["then", "he"]) == [("a", None), (" ", None), ("t", "stop")]


def test_blanks_between_words_stay_where_a_text_has_none_before_its_first() -> None:
    words = ["", " the", " cat", " sat"]  # the first is a special token
    found: list[tuple[str, object]] = []
    job = Job([1], None, 6, found.append)
    for token in (1, 0, 2, 0, 0, 3):
        job.push(token, False, lambda tokens: "".join(words[token] for token in tokens).removeprefix(" "))
    assert "".join(piece for piece, _ in found) == "the cat sat"


def test_a_job_of_one_token_ends_with_it() -> None:
    assert pieces(b"a") == [("a", "length")]
    assert pieces(b"", ends=True) == [("", "stop")]
