"""The supervised program that watches an environment: `python -m flows.monitoring.serve --environment NAME`.

It takes a round each minute in this process: starting a separate process for a flow run costs more CPU than a round.
With [monitoring] watcher = true it also takes the checks of every few minutes (flows/monitoring/frequent.py).
Rounds do not need Prefect. After a change, and once an hour, watch-metrics runs as a flow, with a report for people.
Two watchers of the same environment take turns.

With [monitoring] metrics_address it serves /metrics for Prometheus. With --host it measures only the disks and
processors of that host, and serves them to the environment's watcher ([monitoring.hosts]).
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from blocks.environment import Environment
from flows.monitoring.exposition import Exposition, known_of, serve
from flows.monitoring.frequent import FrequentChecks
from flows.monitoring.metrics import watch_metrics
from flows.monitoring.rounds import Round, take_round, tell_watching
from flows.monitoring.sources import CPU, Reading, read_disks, read_host
from flows.monitoring.table import named
from flows.recovery.objectives import board
from flows.recovery.objectives.check import serves_elsewhere
from flows.recovery.objectives.points import read_recovery_points
from runbook.drivers import exit_code
from runbook.errors import OpsError
from tasks.prefect.client import serves
from tasks.recovery_points import standing

EVERY_SECONDS, REPORT_SECONDS, ANSWER_SECONDS = 60.0, 3600.0, 3.0
REFRESH = timedelta(minutes=10)


class MetricsWatcher:
    """Takes the rounds of an environment, and prints changed results and errors to the service's log."""

    def __init__(self, environment: str, every_seconds: float = EVERY_SECONDS) -> None:
        self.environment, self.every_seconds = environment, every_seconds
        self.stop = threading.Event()
        self.serves = False
        self._said, self._reported_at = "", -REPORT_SECONDS
        self._frequent = FrequentChecks(is_there, self._say_once)

    def run(self) -> None:
        """Take rounds until `stop` is set. No error in a round ends it."""
        while True:
            try:
                self.round()
            except OpsError as error:
                self._say_once(str(error))
            except Exception:
                self._say_once(traceback.format_exc())
            if self.stop.wait(self.every_seconds - time.time() % self.every_seconds):
                return

    def round(self) -> None:
        """Take one round. It reads the environment again, so that a new limit applies at once.

        Raises:
            OpsError: the TOML is wrong, or the state cannot be written.
        """
        env = Environment.find(self.environment)
        if elsewhere := serves_elsewhere(env):
            self._say_once(f"users are sent to {elsewhere}: this region is not judged")
            self._frequent.kick(env)
            if self._frequent.is_healthy(env):
                tell_watching(env, datetime.now(UTC))
            return
        started, spent = time.monotonic(), time.process_time()
        found = take_round(env, datetime.now(UTC), alive=self._frequent.is_healthy(env))
        took = f"{time.monotonic() - started:.1f} s, {time.process_time() - spent:.2f} s of CPU"
        self._report_results(found, took)
        if found.changed or time.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = time.monotonic()
            self._report()
        if self.serves:
            _refresh(env)
        if not found.by_another:
            self._frequent.kick(env)

    def exposition(self) -> Exposition:
        """The metrics that /metrics serves."""
        self.serves = True
        return Exposition(self.find, known_of(self.find), lambda: datetime.now(UTC))

    def find(self) -> Environment:
        """The environment, read again."""
        return Environment.find(self.environment)

    def _report_results(self, found: Round, took: str) -> None:
        for name, change in found.changed.items():
            say(f"{change}: {name}: {found.standings[name].told}")
        exceeded = sorted(name for name, one in found.standings.items() if one.exceeded)
        told = f"exceeded: {', '.join(exceeded)}" if exceeded else f"{len(found.standings)} metrics are healthy"
        told += f"; {found.unsent} events are not sent yet: {found.problem}" if found.problem else ""
        self._say_once(told, f" ({took})")

    def _report(self) -> None:
        """As a flow run if Prefect answers, otherwise as a report only."""
        try:
            (watch_metrics if is_there() else watch_metrics.fn)(self.environment)
        except OpsError as error:  # usually CRITICAL: the report and the event have it
            say(error.message)

    def _say_once(self, text: str, more: str = "") -> None:
        if text != self._said:
            self._said = text
            say(text + more)


class HostWatcher(MetricsWatcher):
    """Measures the disks and processors of this host, which the environment's TOML calls `host`. It sends no events."""

    def __init__(self, environment: str, host: str, every_seconds: float = EVERY_SECONDS) -> None:
        super().__init__(environment, every_seconds)
        self.host, self._counters = host, ("", 0.0, 0.0)
        self._at: datetime | None = None
        self._readings = dict[str, Reading]()

    def round(self) -> None:
        """Take one round.

        Raises:
            OpsError: the environment's TOML is wrong.
        """
        processors, self._counters = read_host(self._counters, f" of {self.host}")
        found = {**read_disks(self.find(), self.host), CPU: processors}
        self._readings = {named(metric, self.host): reading for metric, reading in found.items()}
        self._at = datetime.now(UTC)
        unknown = [one.told for one in found.values() if one.value is None]
        self._say_once(f"not measured: {'; '.join(unknown)}" if unknown else f"{len(found)} metrics are measured")

    def exposition(self) -> Exposition:
        """The metrics that /metrics serves."""
        return Exposition(self.find, lambda: (self._at, self._readings, {}), lambda: datetime.now(UTC))


def _refresh(env: Environment) -> None:
    """Rebuild the recovery board if check-recovery-objectives has not run for a while: Prefect may be down."""
    found = standing.read(env.reports_directory)
    if not found or datetime.now(UTC) - found.checked > REFRESH:
        board.rebuild(env, read_recovery_points(env))


def is_there() -> bool:
    """Return True if Prefect and its database answer now. This starts no temporary server."""
    try:
        return serves(ANSWER_SECONDS)
    except OpsError:  # sending events reports the refused log-in
        return False


def say(text: str) -> None:
    """Print a line to the service's log."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}", flush=True)


def main(arguments: Sequence[str] = ()) -> int:
    """Run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m flows.monitoring.serve", description=__doc__)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--every-seconds", type=float, default=EVERY_SECONDS)
    parser.add_argument("--host", default="", help="measure only this host, by its name in the TOML")
    given = parser.parse_args(arguments or None)
    watcher = (
        HostWatcher(given.environment, given.host, given.every_seconds)
        if given.host
        else MetricsWatcher(given.environment, given.every_seconds)
    )
    try:
        close = _serve(watcher)
    except OpsError as error:
        say(str(error))
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: watcher.stop.set())
    say(f"watching {given.environment}{f' on {given.host}' if given.host else ''}")
    watcher.run()
    close()
    return 0


def _serve(watcher: MetricsWatcher) -> Callable[[], None]:
    env = watcher.find()
    listens = env.monitoring.listens() if env.has("monitoring") else None
    if not listens:
        return lambda: None
    say(f"serving /metrics on {env.monitoring.metrics_address}")
    return serve(watcher.exposition(), *listens)


if __name__ == "__main__":
    sys.exit(exit_code(main))
