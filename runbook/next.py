"""A runbook to launch next, as a value: a finding carries it, and its page links to the form, filled in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Next:
    """A runbook by its flow's name (`check-connections`), what for, and the values of its form. `reminder`: what the
    reader must not overlook."""

    flow: str
    why: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    reminder: str = ""

    def __str__(self) -> str:
        given = ", ".join(f"{name}={_word(value)}" for name, value in self.parameters.items())
        return f"{self.flow} with {given}" if given else self.flow

    def command(self, environment: str) -> str:
        """The command that launches it."""
        given = {"environment": environment, **self.parameters}
        words = [f"{name}={_word(value)}" for name, value in given.items()]
        return shlex.join(["python", "-m", "flows.launch", self.flow, *words])


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
