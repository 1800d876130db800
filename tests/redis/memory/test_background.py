"""The pass beside other clients: with the least claim on the processor, ended with its run, its errors the run's."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from flows.redis.cache import clear_cache
from flows.redis.memory.check import check_redis_memory
from runbook.current import current_report, use_report
from runbook.errors import Unreachable
from runbook.report import Report
from runbook.wait import until
from tasks.redis.background import NICENESS, in_background
from tasks.redis.cache import sweep as cache_sweep
from tasks.redis.memory import sweep as memory_sweep
from tests.redis.servers import NAME, RedisServer


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_it_gives_way_and_nobody_else_does() -> None:
    before, seen = niceness(), list[int]()

    def pages() -> Generator[None, None, str]:
        for _ in range(3):
            seen.append(niceness())
            yield
        return "done"

    assert in_background(pages()) == "done"
    assert seen == [max(before, NICENESS)] * 3
    assert niceness() == before
    until(lambda: others() == {before}, what="the end of the pass's thread", seconds=120)


def others() -> set[int]:
    """Of every thread of this process that is there still when it is looked at."""
    found = set()
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found.add(int(stat.read_text().rsplit(") ", 1)[1].split()[16]))
    return found


def test_what_it_raises_is_raised_here_and_what_it_holds_is_let_go() -> None:
    left = []

    def pages() -> Generator[None, None, None]:
        try:
            yield
            raise Unreachable("gone", "start it")
        finally:
            left.append(threading.current_thread())

    with pytest.raises(Unreachable, match="gone — start it"):
        in_background(pages())
    assert left != [threading.current_thread()]


def test_it_knows_its_run() -> None:
    def pages() -> Generator[None, None, Report | None]:
        yield
        return current_report()

    with use_report(Report("x", "y")):
        found = in_background(pages())
    assert found
    assert found.runbook == "x"


class Cancelled(BaseException):
    """As Prefect ends a run."""


@pytest.fixture
def cancelled() -> Iterator[None]:
    def cancel(*_: object) -> None:
        raise Cancelled

    before = signal.signal(signal.SIGUSR1, cancel)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_run_that_is_cancelled_ends_it_after_the_page_at_hand(cancelled: None) -> None:
    done, closed = list[int](), list[bool]()

    def pages() -> Generator[None, None, None]:
        try:
            for number in range(1_000_000):
                done.append(number)
                if number == 2:
                    os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.001)  # a million of them take longer than anybody stands still
                yield
        finally:
            closed.append(True)

    passing = pages()  # held here: that nobody needs it any more does not close it
    with pytest.raises(Cancelled):
        in_background(passing)
    assert closed == [True]
    last = len(done)
    assert 3 <= last < 1_000_000
    assert not any(thread.name == "pass" for thread in threading.enumerate())
    assert len(done) == last


def test_both_passes_give_way(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client().mset({f"cache:{n}": "x" for n in range(2000)})
    before, seen = niceness(), dict[str, set[int]]()
    real = memory_sweep.read_page

    def ask(*words: object) -> object:
        seen.setdefault("read", set()).add(niceness())
        return real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(memory_sweep, "read_page", ask)
    monkeypatch.setattr(cache_sweep, "failpoint", lambda name: seen.setdefault(name, set()).add(niceness()))
    check_redis_memory.fn(NAME)
    clear_cache.fn(NAME, prefixes=("cache:",), confirm=NAME)
    lowered = {max(before, NICENESS)}
    assert seen == {"read": lowered, "cache: counted a page": lowered, "cache: unlinked a page": lowered}
    assert server.client().dbsize() == 0
