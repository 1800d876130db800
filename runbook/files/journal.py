"""How far a run came: its state, the steps that needed a permit, and what it has created and not removed yet.

A run that is cancelled reports this. A run that changes an environment also keeps it in a file, which only a run that
is killed with -9 leaves behind: the next run that takes the environment's lock, and `escalate`, report it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from runbook import clock
from runbook.guard.process import is_abandoned, this_process

NAME = ".unfinished-{}-{}.jsonl"
UNCHANGED = "nothing live was changed"
AGAIN = "run it again: it is safe, and an empty confirm shows the plan"
FIX = "fix the findings above, then "
SEE_PLAN = "run it again with an empty confirm: the plan shows what is live now"


@dataclass(frozen=True)
class Standing:
    """What a run that did not end left: what it changed, the next step, and what is left (by whom it is removed)."""

    changed: str
    next_step: str
    left: Mapping[str, str] = field(default_factory=dict)
    is_live: bool = False
    """Whether it began a step that changes live data."""

    @property
    def left_text(self) -> str:
        """`database app__new (the next restore drops it)`; "" where nothing is left."""
        return "; ".join(f"{what} ({by})" for what, by in self.left.items())

    @property
    def text(self) -> str:
        """All of it for a fact."""
        left = f"; left behind: {self.left_text}" if self.left else "; nothing was left behind"
        return f"{self.changed}{left}. Next: {self.next_step}"


@dataclass
class Journal:
    """Of one run. Without a `path` it is kept in memory only."""

    path: Path | None = None
    entries: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, directory: Path, environment: str, runbook: str, run: str) -> Journal:
        """One in a file; `run` is the flow run's id, or "". A disk that is full stops no recovery."""
        journal = cls(directory / NAME.format(environment, secrets.token_hex(6)))
        journal._write("run", runbook, json.dumps([this_process().text, run, datetime.now(UTC).isoformat()]))
        return journal

    def step(self, name: str, *, staged: bool) -> None:
        """A step that needs a permit begins. `staged`: it builds something alongside the live data."""
        self._write("staged" if staged else "live", name)

    def done(self, name: str) -> None:
        """That step is done."""
        self._write("done", name)

    def state(self, what: str, next_step: str) -> None:
        """The state of the system from here on, and what to do should the run end here."""
        self._write("state", what, next_step)

    def leave(self, what: str, removed_by: str) -> None:
        """The run is about to create or to stop something that stays if the run ends here; `removed_by` is a clause:
        “the next restore drops it”."""
        self._write("left", what, removed_by)

    def remove(self, what: str) -> None:
        """That is removed, or started again."""
        if any(entry[:2] == ("left", what) for entry in self.entries):
            self._write("removed", what)

    def close(self) -> None:
        """The run's report has been written."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def standing(self) -> Standing:
        """How far the run came."""
        begun, interrupted, left = list[str](), list[str](), dict[str, str]()
        state: tuple[str, str] | None = None
        is_live = False
        for kind, what, more in self.entries:
            if kind == "state":
                state, begun = (what, more), []
            elif kind == "live":
                is_live = True
                begun.append(what)
                interrupted.append(what)
            elif kind == "done" and what in interrupted:
                interrupted.remove(what)
            elif kind == "left":
                left[what] = more
            elif kind == "removed":
                left.pop(what, None)
        if begun:
            changed, next_step = _steps([one for one in begun if one not in interrupted], interrupted), SEE_PLAN
            changed += f"; before that: {state[0]}" if state else ""
        else:
            changed, next_step = state or (UNCHANGED, AGAIN)
            next_step = next_step.removeprefix(FIX)  # nothing was found: the run was ended
        return Standing(changed, next_step, left, is_live)

    def _write(self, kind: str, what: str, more: str = "") -> None:
        self.entries.append((kind, what, more))
        if self.path is None:
            return
        try:
            line = json.dumps([kind, what, more], ensure_ascii=False) + "\n"
            opened = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
            try:
                os.write(opened, line.encode(errors="backslashreplace"))
                os.fsync(opened)
            finally:
                os.close(opened)
        except OSError:
            self.path = None


def _steps(done: list[str], interrupted: list[str]) -> str:
    named = [f"irreversible steps done: {_named(done)}"] if done else []
    named += [f"interrupted, with an unknown result: {_named(interrupted)}"] if interrupted else []
    return "; ".join(named)


def _named(steps: list[str]) -> str:
    return ", ".join(dict.fromkeys(step.replace("_", " ") for step in steps))


@dataclass(frozen=True)
class DeadRun:
    """A run whose process died: its runbook, its flow run's id, and when it began."""

    journal: Journal
    runbook: str
    run: str
    began: datetime

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.runbook} of {clock.text(self.began)}: {self.journal.standing().text}"


def find_dead(directory: Path, environment: str) -> Iterator[DeadRun]:
    """The runs of this environment whose process died before they could write their report, oldest first."""
    found = []
    for path in directory.glob(NAME.format(environment, "?" * 12)):
        with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
            lines = path.read_text(encoding="utf-8").splitlines()
            entries = [(str(kind), str(what), str(more)) for kind, what, more in map(json.loads, _whole(lines))]
            process, run, began = json.loads(entries[0][2])
            if is_abandoned(process, path):
                dead = DeadRun(Journal(path, entries), entries[0][1], run, datetime.fromisoformat(began))
                found.append(dead)
    yield from sorted(found, key=lambda one: one.began)


def _whole(lines: list[str]) -> Iterator[str]:
    """Without a last line that a power cut has torn."""
    return (line for line in lines if line.endswith("]"))
