"""A stream that is read ahead: the same bytes, the same errors, and no thread is left."""

from __future__ import annotations

import io
import os
import threading

import pytest

from tasks.backups.read_ahead import CHUNK_BYTES, CHUNKS, read_ahead


def ahead() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read ahead"]


def test_it_is_the_same_content_and_ends_with_its_reader() -> None:
    content = os.urandom(CHUNK_BYTES * 3 + 7)
    with read_ahead(io.BytesIO(content)) as stream:
        found = [stream.read(1000), stream.read(CHUNK_BYTES * 2), stream.read()]
        assert b"".join(found) == content
        assert stream.read(1) == b""
    with read_ahead(io.BytesIO(bytes(CHUNK_BYTES * CHUNKS * 3))) as stream:
        stream.read(1)  # the thread waits for a reader that goes away
    assert ahead() == []


def test_an_error_is_raised_where_it_is_met() -> None:
    class Damaged(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if chunk := super().read(size):
                return chunk
            raise EOFError("cut off")

    with read_ahead(Damaged(b"x" * 10)) as stream:
        assert stream.read(10) == b"x" * 10
        with pytest.raises(EOFError, match="cut off"):
            stream.read(1)
    assert ahead() == []
