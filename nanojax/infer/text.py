"""Text as it streams."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator


def utf8_stream(pieces: Iterable[bytes]) -> Iterator[str]:
    """Bytes of tokens -> text, a character held back until its last byte is there; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
