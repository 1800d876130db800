"""Which keys a clearing means: literal prefixes or a glob as Redis defines it, without the protected ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COLON_BYTES = 64


@dataclass(frozen=True)
class Term:
    """Keys that begin with `prefix`, but for those that begin with one of `guards`."""

    prefix: bytes
    guards: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The keys that are meant. `match` is a glob that SCAN gets; each key is looked at again by `terms`, the longest
    first. `by_colon`: counted by what stands before their first colon, not by term."""

    terms: tuple[Term, ...]
    match: bytes
    told: str
    by_colon: bool = False
    without_ttl: bool = False

    def words(self) -> list[bytes]:
        """The terms as arguments of a script."""
        words: list[bytes] = []
        for term in self.terms:
            words += [term.prefix, b"%d" % len(term.guards), *term.guards]
        return words

    def term_of(self, key: bytes) -> Term | None:
        """The term that a key belongs to, protected or not."""
        return next((term for term in self.terms if key.startswith(term.prefix)), None)


def escaped(prefix: bytes) -> bytes:
    """A glob that matches this text only (https://valkey.io/commands/keys/)."""
    return re.sub(rb"([*?\[\]\\^-])", rb"\\\1", prefix)


def literal_head(pattern: bytes) -> bytes:
    """What every key begins with that a glob matches."""
    head, place = bytearray(), 0
    while place < len(pattern) and pattern[place] not in b"*?[":
        if pattern[place] == ord("\\") and place + 1 < len(pattern):
            place += 1
        head.append(pattern[place])
        place += 1
    return bytes(head)


def of_prefixes(prefixes: Sequence[bytes], guarded: Iterable[bytes], told: str, *, without_ttl: bool) -> Selection:
    """Keys that begin with one of `prefixes`, which are taken as they stand. A prefix at or below a guarded one names
    it; a shorter one leaves that one's keys out."""
    ordered = sorted(set(prefixes), key=len, reverse=True)
    guards = tuple(guarded)
    terms = [Term(p, tuple(g for g in guards if g.startswith(p) and g != p)) for p in ordered]
    shared = bytes(os.path.commonprefix(ordered) or b"")  # noqa: RUF071 (of bytes, not of paths)
    return Selection(tuple(terms), escaped(shared) + b"*", told, without_ttl=without_ttl)


def of_pattern(pattern: bytes, guarded: Iterable[bytes], told: str) -> Selection:
    """Keys that a glob matches. It names a guarded prefix where its literal beginning does."""
    head = literal_head(pattern)
    guards = tuple(guard for guard in guarded if guard.startswith(head) and guard != head)
    return Selection((Term(head, guards),), pattern, told, by_colon=True)
