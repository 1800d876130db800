"""One thing that was checked: what was found, what is expected, the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from runbook.errors import OpsError
from runbook.masking import without_logins

Level = Literal["OK", "WARN", "CRITICAL"]
WIDTH = len("CRITICAL")


@dataclass(frozen=True)
class DoctorLine:
    """`todo` is the next step, empty where nothing is wrong; `otherwise` says how bad it is."""

    what: str
    todo: str = ""
    expected: str = ""
    otherwise: Level = "CRITICAL"

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.todo

    @property
    def level(self) -> Level:
        """OK, WARN or CRITICAL."""
        return "OK" if self.ok else self.otherwise

    def __str__(self) -> str:
        expected = f" — expected: {self.expected}" if self.expected and not self.ok else ""
        return without_logins(f"{self.level:<{WIDTH}}  {self.what}{expected}{f' — {self.todo}' if self.todo else ''}")


Look = Callable[[], Iterable[DoctorLine]]


def expect(ok: object, what: str, todo: str, expected: str = "") -> DoctorLine:
    """A line by whether it holds: OK or CRITICAL."""
    return DoctorLine(what, "" if ok else todo, expected)


def prefer(ok: object, what: str, todo: str, expected: str = "") -> DoctorLine:
    """A line by whether it holds: OK or WARN."""
    return replace(expect(ok, what, todo, expected), otherwise="WARN")


def refused(what: str, error: OpsError) -> DoctorLine:
    """What kept a check from its answer."""
    return DoctorLine(f"{what}: {error.message}", error.hint or "check it by hand")


def looked(what: str, look: Look) -> Iterator[DoctorLine]:
    """The lines of a check, to its end or to what kept it from that: an error is a line too."""
    try:
        yield from look()
    except OpsError as error:
        yield refused(what, error)
    except Exception as error:
        told = str(error).splitlines()
        yield DoctorLine(f"{what}: not checked", f"{type(error).__name__}: {told[0][:200] if told else ''}")
