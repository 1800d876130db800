"""A stream that is read ahead by a thread: decompressing and what is done with the content use two processors."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 1 << 20
CHUNKS = 8


class _Ahead(io.RawIOBase):
    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._chunks = queue.Queue[bytes | BaseException](CHUNKS)
        self._ended = threading.Event()
        self._left = memoryview(b"")
        self._is_over = False
        self._thread = threading.Thread(target=self._fill, name="read ahead", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            while not self._ended.is_set():
                chunk = self._source.read(CHUNK_BYTES)
                self._put(chunk)
                if not chunk:
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: bytes | BaseException) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._chunks.put(item, timeout=0.1)
                return

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        if not self._left and not self._is_over:
            item = self._chunks.get()
            if isinstance(item, BaseException):
                self._is_over = True
                raise item
            self._left, self._is_over = memoryview(item), not item
        count = min(len(self._left), len(target))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        super().close()


@contextlib.contextmanager
def read_ahead(source: IO[bytes]) -> Iterator[IO[bytes]]:
    """A stream of the content of `source`, which stays open. An error of reading is raised where it is met."""
    with io.BufferedReader(_Ahead(source), CHUNK_BYTES) as stream:
        yield cast(IO[bytes], stream)
