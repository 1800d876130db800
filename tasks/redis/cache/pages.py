"""The pages of a clearing, by script or, for users whom the ACL forbids EVAL, in plain commands.

Names do not change, so UNLINK by name is as safe there; keys without a TTL are taken by `PEXPIRE key 0 NX`, which
deletes only where there is none (https://valkey.io/commands/pexpire/). Only that frees a big value at once where the
server's lazyfree-lazy-expire is off.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from tasks.redis.cache.script import PAGE, Scripts, alone, evaluated
from tasks.redis.cache.selection import COLON_BYTES, Selection
from tasks.redis.server import call

CHUNK = 1000


@dataclass
class Group:
    """Keys of one prefix. Of `measured` of them bytes and TTL are known."""

    keys: int = 0
    measured: int = 0
    bytes: int = 0
    untimed: int = 0

    def add(self, other: Group) -> None:
        """The same prefix on another page."""
        self.keys += other.keys
        self.measured += other.measured
        self.bytes += other.bytes
        self.untimed += other.untimed


@dataclass
class Page:
    """What one call did: the next cursor, and the keys by prefix. `error` ended it: what it did before is counted."""

    cursor: bytes
    seconds: float
    seen: int = 0
    timed: int = 0
    measurable: bool = True
    groups: dict[bytes, Group] = field(default_factory=dict)
    protected: Counter[bytes] = field(default_factory=Counter)
    names: list[bytes] = field(default_factory=list)
    error: redis.RedisError | None = None


@dataclass(frozen=True)
class Ask:
    """What every page of a sweep has in common: one key in `stride` is measured, `scripts` may be called so."""

    selection: Selection
    unlink: bool
    stride: int
    scripts: Scripts

    @functools.cached_property
    def words(self) -> tuple[bytes, ...]:
        """Those arguments of a script that do not change."""
        wanted = self.selection
        flags = b"%d %d %d %d" % (self.stride, self.unlink, wanted.without_ttl, wanted.by_colon)
        return (wanted.match, flags, *wanted.words())


def read_page(client: redis.Redis, ask: Ask, cursor: bytes, step: int, seen: int, names: int) -> Page:
    """One page, counted or unlinked; `seen` is the page before's, and at most `names` keys are named."""
    return (_scripted if ask.scripts else _plain)(client, ask, cursor, step, seen, names)


def _scripted(client: redis.Redis, ask: Ask, cursor: bytes, step: int, seen: int, names: int) -> Page:
    began = time.perf_counter()
    words = (cursor, b"%d %d %d" % (step, seen, names), *ask.words)
    found = evaluated(client, ask.scripts, PAGE, *words, named="SCAN or PTTL")
    timed, took, seen, measurable, groups, guards = map(int, found[1].split())
    page = Page(found[0], took / 1e6 if took >= 0 else time.perf_counter() - began, seen, timed, bool(measurable))
    after_groups = 2 + 2 * groups
    after_guards = after_groups + 2 * guards
    for place in range(2, after_groups, 2):
        page.groups[found[place]] = Group(*map(int, found[place + 1].split()))
    for place in range(after_groups, after_guards, 2):
        page.protected[found[place]] = int(found[place + 1])
    if len(found) > after_guards and isinstance(found[-1], redis.ResponseError):
        page.error = alone(found.pop(), "UNLINK")
    page.names = found[after_guards:]
    return page


def _plain(client: redis.Redis, ask: Ask, cursor: bytes, step: int, seen: int, names: int) -> Page:
    wanted, began = ask.selection, time.perf_counter()
    following, keys = call(client, "SCAN", cursor, "MATCH", wanted.match, "COUNT", step)
    page = Page(following if isinstance(following, bytes) else b"%d" % following, 0.0, seen)
    chosen = dict[bytes, list[bytes]]()
    for key in keys:
        if term := wanted.term_of(key):
            if guard := next((guard for guard in term.guards if key.startswith(guard)), None):
                page.protected[guard] += 1
            else:
                colon = key.find(b":", 0, COLON_BYTES)
                chosen.setdefault(key[: colon + 1] if wanted.by_colon else term.prefix, []).append(key)
    if wanted.without_ttl:
        _keep_untimed(client, page, chosen)
    for name, found in chosen.items():
        page.groups[name] = _measured(client, page, found, ask)
        page.names += found[: names - len(page.names)]
    try:
        for name, found in chosen.items():
            if ask.unlink:
                _unlink(client, page.groups[name], found, wanted.without_ttl)
            else:
                page.groups[name].keys = len(found)
    except redis.RedisError as error:
        page.error = error
    page.seconds = time.perf_counter() - began
    return page


def _piped(client: redis.Redis, commands: Iterable[Sequence[object]]) -> list[Any]:
    """Answers, errors among them."""
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            call(pipe, *command)
        return pipe.execute(raise_on_error=False)


def _certain(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _keep_untimed(client: redis.Redis, page: Page, chosen: dict[bytes, list[bytes]]) -> None:
    for name, keys in chosen.items():
        left = _certain(_piped(client, (("PTTL", key) for key in keys)))
        page.timed += sum(milliseconds > -1 for milliseconds in left)
        chosen[name] = [key for key, milliseconds in zip(keys, left, strict=True) if milliseconds == -1]


def _measured(client: redis.Redis, page: Page, keys: Sequence[bytes], ask: Ask) -> Group:
    sample = keys[:: ask.stride]
    answers = _piped(client, (("MEMORY", "USAGE", key) for key in sample))
    left = _piped(client, (("PTTL", key) for key in sample))
    if any(isinstance(answer, Exception) for answer in (*answers, *left)):  # the ACL forbids it
        page.measurable = False
        return Group()
    return Group(measured=len(sample), bytes=sum(size or 0 for size in answers), untimed=left.count(-1))


def _unlink(client: redis.Redis, group: Group, keys: Sequence[bytes], without_ttl: bool) -> None:
    """Counts as it goes: the next call may be refused."""
    if without_ttl:
        answers = _piped(client, (("PEXPIRE", key, 0, "NX") for key in keys))
        group.keys += sum(answer for answer in answers if isinstance(answer, int))
        _certain(answers)
        return
    for first in range(0, len(keys), CHUNK):
        group.keys += int(call(client, "UNLINK", *keys[first : first + CHUNK]))
