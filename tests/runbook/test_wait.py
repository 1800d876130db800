"""Waiting with a deadline."""

from __future__ import annotations

import contextvars
import threading
import time

import pytest

from runbook.errors import OpsError, Unreachable
from runbook.wait import until, within


def test_it_returns_the_first_true_answer() -> None:
    answers = iter([None, 0, "", "ready", "later"])
    assert until(lambda: next(answers), what="it", seconds=120, every_seconds=0) == "ready"


def test_unreachable_means_not_yet() -> None:
    answers = iter([True, False])

    def ready() -> bool:
        if next(answers):
            raise Unreachable("nobody answers")
        return True

    assert until(ready, what="it", seconds=120, every_seconds=0)


def test_other_errors_are_raised_at_once() -> None:
    def ready() -> bool:
        raise OpsError("refused")

    with pytest.raises(OpsError, match="refused"):
        until(ready, what="it", seconds=30)


def test_after_the_deadline_it_says_what_did_not_happen_and_why() -> None:
    def ready() -> bool:
        raise Unreachable("nobody answers", "start it")

    started = time.monotonic()
    with pytest.raises(Unreachable) as error:
        until(ready, what="the start", seconds=1, every_seconds=0.1, hint="look at the log")
    assert error.value.message == "the start did not happen within 1 s (last: nobody answers)"
    assert error.value.hint == "look at the log"
    assert 1 <= time.monotonic() - started < 120


def test_it_asks_once_even_without_time() -> None:
    assert until(lambda: 7, what="it", seconds=0) == 7
    with pytest.raises(Unreachable, match="within 0 s"):
        until(lambda: None, what="it", seconds=0)


def test_work_that_hangs_is_left_behind() -> None:
    with pytest.raises(OpsError, match="an answer did not happen within 0 s"):
        within(0.1, threading.Event().wait, "an answer")


def test_what_work_returns_and_raises_comes_back_from_the_same_context() -> None:
    known = contextvars.ContextVar("known", default="")
    known.set("here")
    assert within(120, known.get, "it") == "here"
    with pytest.raises(TimeoutError, match="its own"):
        within(120, _times_out, "it")


def _times_out() -> None:
    raise TimeoutError("its own")
