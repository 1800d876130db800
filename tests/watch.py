"""What every user of a host can read: the command lines of all processes; and what files and logs must not hold.

What this process starts is noted as it starts (a program may live for milliseconds); what others start is looked at by
a process of its own, as often as it can: a thread would wait for this process's interpreter just while it works.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus


@dataclass
class Watch:
    """The different command lines that were seen, complete when the watching ends."""

    lines: list[list[str]] = field(default_factory=list)

    def seen(self, program: str, word: str) -> bool:
        """Whether the program was started, perhaps through another (setpriv), with a word that begins so."""
        found = (line for line in self.lines if program in {Path(each).name for each in line})
        return any(each.startswith(word) for line in found for each in line)

    def holding(self, secrets: Iterable[str]) -> list[str]:
        """The command lines with a secret in them, in whatever spelling."""
        return [text for text in map(" ".join, self.lines) if holds(text.encode(errors="surrogateescape"), secrets)]


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch while the block works."""
    watch = Watch()
    _hear()
    with subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == b"watching\n"
        _listening.append(watch)
        try:
            yield watch
        finally:
            _listening.remove(watch)
            answer, _ = child.communicate(b"enough\n")
        watch.lines += json.loads(answer)
    assert child.returncode == 0


_listening: list[Watch] = []


@functools.cache
def _hear() -> None:
    """Once in a process: Python takes no such hook back. https://docs.python.org/3/library/audit_events.html"""

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            for watch in _listening:
                watch.lines.append([os.fsdecode(word) for word in arguments[1]])  # type: ignore[attr-defined]

    sys.addaudithook(heard)


def spellings(secret: str) -> set[bytes]:
    """As it is, as in a URL (by urllib, by SQLAlchemy), as in JSON and in a shell."""
    quoted = {quote(secret), quote(secret, safe=""), quote(secret, safe=" +"), quote_plus(secret)}
    return {text.encode() for text in (secret, *quoted, json.dumps(secret)[1:-1], secret.replace(" ", "\\ "))}


def holds(content: bytes, secrets: Iterable[str]) -> bool:
    """Whether one of the secrets is in it, in whatever spelling."""
    return any(spelling in content for secret in secrets for spelling in spellings(secret))


def files_holding(paths: Iterable[Path], secrets: Iterable[str]) -> list[Path]:
    """The files with a secret in them, or in their names; directories with all that is below them."""
    every = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    looked = list(secrets)
    return [
        file
        for file in every
        if holds(str(file).encode(errors="surrogateescape"), looked) or holds(_content(file), looked)
    ]


def _content(path: Path) -> bytes:
    """Nothing of a directory, nor of a file that is removed while they are looked at."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""


def _look() -> Iterator[bytes]:
    for name in os.listdir("/proc"):  # noqa: PTH208 (twice as fast, and the names are all that is wanted)
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:  # noqa: PTH123
                yield file.read()


def _watch() -> None:
    """Until there is something on stdin, or nobody any more; then what was seen, as JSON."""
    lines = set(_look())
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        lines.update(_look())
    words = [line.decode(errors="surrogateescape").split("\0") for line in lines if line]
    print(json.dumps(words))


if __name__ == "__main__":
    _watch()
