"""Which keys a clearing deletes: those that begin with literal prefixes, except the protected ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """Keys that begin with `prefix`, except those that begin with one of `protected`."""

    prefix: bytes
    protected: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class KeySelection:
    """The keys to delete. `match` is SCAN's glob; each key it returns is compared with `terms`, the longest first.
    `by_colon`: counted by what precedes a key's first colon, not by term."""

    terms: tuple[Term, ...]
    match: bytes
    text: str
    by_colon: bool = False
    without_ttl: bool = False

    def words(self) -> list[bytes]:
        """The terms as arguments of a script."""
        words: list[bytes] = []
        for term in self.terms:
            words += [term.prefix, b"%d" % len(term.protected), *term.protected]
        return words


def escaped(prefix: bytes) -> bytes:
    """A glob that matches only this text (https://valkey.io/commands/keys/)."""
    return re.sub(rb"([*?\[\]\\^-])", rb"\\\1", prefix)


def by_prefixes(prefixes: Sequence[bytes], protected: Iterable[bytes], text: str, *, without_ttl: bool) -> KeySelection:
    """Keys that begin with one of `prefixes`. A prefix equal to or longer than a protected one names it; a shorter one
    leaves that one's keys out."""
    ordered, guards = sorted(set(prefixes), key=len, reverse=True), tuple(protected)
    terms = [Term(one, tuple(guard for guard in guards if guard.startswith(one) and guard != one)) for one in ordered]
    shared = bytes(os.path.commonprefix(ordered) or b"")  # noqa: RUF071 (of bytes, not of paths)
    return KeySelection(tuple(terms), escaped(shared) + b"*", text, without_ttl=without_ttl)


def every_key(protected: Iterable[bytes]) -> KeySelection:
    """All keys, except the protected ones."""
    return KeySelection((Term(b"", tuple(protected)),), b"*", "key", by_colon=True)
