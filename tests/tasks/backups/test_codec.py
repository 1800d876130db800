"""The codec of stored content: what it reads, and that damage is an error wherever it is."""

from __future__ import annotations

import gzip
import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from runbook.errors import VerificationFailed
from tasks.backups import codec

CONTENT = random.Random(7).randbytes(300_000) + b"interview " * 200_000


def _written(threads: int) -> bytes:
    target = io.BytesIO()
    with codec.writer(target, threads=threads) as stream:
        for begin in range(0, len(CONTENT), 77_777):
            stream.write(CONTENT[begin : begin + 77_777])
    assert not target.closed
    return target.getvalue()


FORMS: dict[str, Callable[[], bytes]] = {
    "zstd": lambda: codec.compress(CONTENT),
    "zstd in threads": lambda: codec.compress(CONTENT, threads=codec.THREADS),
    "written as a stream": lambda: _written(0),
    "written in threads": lambda: _written(codec.THREADS),
    "two frames": lambda: codec.compress(CONTENT[:1000]) + codec.compress(CONTENT[1000:]),
    "gzip": lambda: gzip.compress(CONTENT, 1),
    "two members of gzip": lambda: gzip.compress(CONTENT[:1000], 1) + gzip.compress(CONTENT[1000:], 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_read_and_what_is_damaged_is_refused(form: str, tmp_path: Path) -> None:
    stored, path = FORMS[form](), tmp_path / "stored"
    path.write_bytes(stored)
    assert len(stored) < len(CONTENT) / 3
    assert codec.decompress(stored) == CONTENT
    with codec.reader(path, len(CONTENT)) as stream:
        assert stream.read() == CONTENT
    with (file := path.open("rb")), codec.reader(file, len(CONTENT)) as stream:
        assert b"".join(iter(lambda: stream.read(100_001), b"")) == CONTENT
        assert not file.closed
    middle = len(stored) // 2
    flipped = stored[:middle] + bytes([stored[middle] ^ 4]) + stored[middle + 1 :]
    for damaged in (flipped, stored[:-1], stored[:middle], stored + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(codec.UNREADABLE):
            codec.decompress(damaged)
        with (
            pytest.raises(VerificationFailed, match=r"^the file is damaged: ") as refused,
            codec.readable("the file", "use another"),
            codec.reader(path, len(CONTENT)) as stream,
        ):
            stream.read()
        assert refused.value.hint == "use another"


def test_content_of_another_kind_is_refused() -> None:
    for other in (b"\x28\xb5", b"PGDMP", bytes(100)):
        with pytest.raises(codec.UNREADABLE):
            codec.decompress(other)
