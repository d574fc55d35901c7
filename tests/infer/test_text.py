"""Streaming text: characters come whole, and nothing is lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from nanojax.infer.text import utf8_stream


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(ends)]


@given(st.text(), st.lists(st.integers(0, 10_000)))
@example("né 中 😀", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])  # every byte on its own
def test_a_character_is_never_split_wherever_the_bytes_are_cut(text, cuts):
    pieces = list(utf8_stream(cut(text.encode(), cuts)))
    assert "".join(pieces) == text
    assert all(pieces), "an empty piece says nothing"


def test_a_character_comes_as_soon_as_its_last_byte_is_there():
    def tokens():
        for byte in "a😀b".encode():
            given_so_far.append(byte)
            yield bytes([byte])

    given_so_far: list[int] = []
    assert [(text, len(given_so_far)) for text in utf8_stream(tokens())] == [("a", 1), ("😀", 5), ("b", 6)]


@given(st.binary(), st.lists(st.integers(0, 10_000)))
def test_any_bytes_give_what_python_decodes_from_them_in_one_go(data, cuts):
    assert "".join(utf8_stream(cut(data, cuts))) == data.decode("utf-8", errors="replace")


def test_bytes_that_are_no_utf8_become_the_replacement_character():
    assert "".join(utf8_stream([b"a\xff", b"b"])) == "a\N{REPLACEMENT CHARACTER}b"
    assert "".join(utf8_stream([b"caf\xc3"])) == "caf\N{REPLACEMENT CHARACTER}"  # the text ends inside a character
