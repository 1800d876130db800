"""One thing that was looked at, and what to do where it is not well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from runbook.errors import OpsError, without_logins


@dataclass(frozen=True)
class Line:
    """`todo` is empty where it is well."""

    what: str
    todo: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is well."""
        return not self.todo

    def __str__(self) -> str:
        return without_logins(f"✔ {self.what}" if self.ok else f"✘ {self.what}: {self.todo}")


Look = Callable[[], Iterable[Line]]


def expect(ok: object, what: str, todo: str) -> Line:
    """A line by whether it holds."""
    return Line(what, "" if ok else todo)


def looked(what: str, look: Look) -> Iterator[Line]:
    """What a look tells, to its end or to what kept it from that: nothing that breaks is passed over."""
    try:
        yield from look()
    except OpsError as error:
        yield Line(f"{what}: {error.message}", error.hint or "look at it by hand")
    except Exception as error:
        told = str(error).splitlines()
        yield Line(f"{what}: not looked at", f"{type(error).__name__}: {told[0][:200] if told else ''}")
