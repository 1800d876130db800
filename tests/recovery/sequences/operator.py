"""What an operator does: launch one runbook in a separate process, without a Prefect server, and read its report.

    python -m tests.recovery.sequences.operator '{"flow": …, "parameters": {…}}'

The last line of its output is the report as JSON, with the headline's effect and the pins of a plan's own form.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from tests.fixtures import forked

MARK = "REPORT: "
SECONDS = 180


class HangingRun(AssertionError):
    """A runbook did not end."""


@dataclass(frozen=True)
class Ran:
    """The report of one run, as far as it came. `lost`: the headline's clause, or its losses. `error`: why it ended
    without a status."""

    flow: str
    status: str = ""
    headline: str = ""
    effect: str = ""
    lost: Any = None
    pins: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    losses: Sequence[Mapping[str, Any]] = ()
    findings: Sequence[Mapping[str, str]] = ()
    started: float = 0.0
    permitted: bool = False
    state: str = ""
    error: str = ""
    output: str = ""

    @property
    def is_done(self) -> bool:
        """Whether it carried out what it was confirmed for."""
        return self.status in ("OK", "WARN")

    @property
    def has_replaced(self) -> bool:
        """Whether it says that it failed after live data was replaced."""
        return (
            self.permitted and bool(self.state) and not self.state.startswith(("nothing", "the live database is unch"))
        )

    @property
    def text(self) -> str:
        """Everything that a person reads of it."""
        found = [f"{one['name']}: {one['value']}. {one['hint']}" for one in self.findings]
        return "\n".join([self.headline, self.effect, *map(": ".join, self.facts.items()), *found, self.error])


def launch(
    flow: str,
    variables: Mapping[str, str],
    parameters: Mapping[str, Any],
    signal_at: tuple[int, float] | None = None,
) -> Ran:
    """Run a runbook to its end, or until it gets a signal after so many seconds."""
    request = json.dumps({"flow": flow, "parameters": dict(parameters)})
    words = ["-m", "tests.recovery.sequences.operator", request]
    child = forked.launch(words, dict(variables), merge=True)
    if signal_at:
        number, seconds = signal_at
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        child.send_signal(number)
    try:
        output, _ = child.communicate(SECONDS)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGUSR1)  # the stacks of its threads
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2)
        child.kill()
        output, _ = child.communicate(30)
        raise HangingRun(f"{flow} does not end within {SECONDS} s\n{output[-6000:]}") from None
    found = re.findall(rf"^{MARK}(.*)$", output, re.MULTILINE)
    if not found:
        return Ran(flow, error=f"exit code {child.returncode}", output=output[-4000:])
    return Ran(**{**json.loads(found[-1]), "output": output[-4000:]})


def main() -> int:
    """Run it, and print its report."""
    from prefect.exceptions import TerminationSignal

    from flows.launch import checked, find_flow
    from runbook.errors import OpsError, RunbookFailed
    from runbook.report import Report

    faulthandler.register(signal.SIGUSR1)
    made: list[Report] = []
    make = Report.__init__

    def remember(self: Report, *values: Any, **named: Any) -> None:
        make(self, *values, **named)
        made.append(self)

    Report.__init__ = remember  # type: ignore[method-assign]
    given = json.loads(sys.argv[1])
    flow, error = find_flow(given["flow"]), ""
    signal.signal(signal.SIGTERM, _end)
    try:
        flow.fn(**checked(flow, given["parameters"]))
    except RunbookFailed:
        pass
    except OpsError as failed:
        error = str(failed)
    except TerminationSignal as ended:
        error = str(ended)
    report = made[0] if made else None
    if report is None:
        print(f"{MARK}{json.dumps(asdict(Ran(given['flow'], error=error)))}")
        return 1
    lost = report.effect.lost if report.effect else None
    ran = Ran(
        given["flow"],
        "" if error else report.status.value,
        report.headline or report.sentence(),
        str(report.effect or ""),
        lost if isinstance(lost, str | None) else [one.as_json() for one in lost],
        report.pins,
        report.facts,
        [one.as_json() for one in report.losses.values()],
        [asdict(one) for one in report.findings],
        report.started.timestamp(),
        report.permitted,
        report.state.value if report.state else "",
        error,
    )
    print(f"{MARK}{json.dumps(asdict(ran), default=str)}", flush=True)
    return 0


def _end(number: int, _frame: FrameType | None) -> None:
    """End a runbook as one that was launched from a shell ends."""
    from prefect.exceptions import TerminationSignal

    raise TerminationSignal(number)


if __name__ == "__main__":
    sys.exit(main())
