"""The supervised program that ships WAL: `python -m tasks.wal.archiver --environment NAME`.

It ships finished segments at once into `[backups] wal`, and into `[copies] wal` if that is set. It ships the unfinished
segment every few seconds under a separate name. It records which timeline the receiver follows. An unreachable archive
does not delay the other one. Prefect is imported once at the start, for the environment's blocks, and does nothing
here.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.guard import containment
from tasks.wal.archive.destinations import destinations_of
from tasks.wal.archive.place import DirectoryPlace
from tasks.wal.archive.received import Frames
from tasks.wal.archive.ship import KEEP_SEGMENTS, Destination, Shipped, ship_to_all, tidy
from tasks.wal.format.names import HISTORY
from tasks.wal.reading.local import find_segments

EVERY_SECONDS, PARTIAL_SECONDS, ASK_AGAIN_SECONDS = 0.5, 5.0, 600.0


class WalArchiver:
    """Rounds over the receiver's directory. It prints each result and each problem once, for the service's log."""

    def __init__(
        self,
        directory: Path,
        destinations: Sequence[Destination],
        keep: int = KEEP_SEGMENTS,
        is_contained: Callable[[], bool] = lambda: False,
    ) -> None:
        self.directory, self.destinations, self.keep = directory, destinations, keep
        self.is_contained = is_contained
        self.stop = threading.Event()
        self._told: dict[str, tuple[str, ...]] = {}
        self._frames = Frames()
        self._partial_at = self._asked_at = 0.0
        self._in_use = ""

    def run(self) -> None:
        """Repeat until the stop signal, then run once more, so that nothing is left."""
        while not self.stop.wait(EVERY_SECONDS):
            self.round()
        self.round(last=True)

    def round(self, *, last: bool = False) -> None:
        """Ship to each place."""
        now = time.monotonic()
        with_partial = last or now - self._partial_at >= PARTIAL_SECONDS
        if now - self._asked_at >= ASK_AGAIN_SECONDS:
            self._asked_at = now
            for destination in self.destinations:
                destination.forget()
        self._ship(with_partial)
        if with_partial:
            self._partial_at = now
        self._tidy()

    def _ship(self, with_partial: bool) -> None:
        try:
            results = ship_to_all(self.directory, self.destinations, partial=with_partial, frames=self._frames)
        except OpsError as error:
            results = {destination.name: Shipped(failure=error) for destination in self.destinations}
        for name, done in results.items():
            self._print(name, done)
        self._note_branch({name[:8] for done in results.values() for name in done.put if not HISTORY.match(name)})

    def _note_branch(self, shipped: set[str]) -> None:
        """Record the timeline that the receiver follows when that changes: also after a promotion or a swap by hand."""
        if not shipped - {self._in_use}:
            return
        try:
            if found := find_segments(self.directory):
                newest = max(found, key=lambda one: (one.start, one.timeline))
                for destination in self.destinations:
                    destination.archive_of(newest.system).note_in_use(newest.timeline)
                self._in_use = newest.name[:8]
        except OpsError as error:
            self._print("timeline in use", Shipped(refused=(error.message,)))

    def _tidy(self) -> None:
        if self.is_contained():  # during an incident all WAL stays
            return
        try:
            for name in tidy(self.directory, self.destinations, self.keep):
                _say(f"{name} is in every archive: deleted here")
        except OpsError as error:
            self._print("tidy", Shipped(refused=(error.message,)))

    def _print(self, place: str, done: Shipped) -> None:
        for name in done.put:
            if not name.endswith(".partial"):
                _say(f"{place}: {name}")
        refused = (str(done.failure),) if done.failure else done.refused
        if refused != self._told.get(place, ()):
            self._told[place] = refused
            for why in refused or ("recovered: no file is refused",):
                _say(f"{place}: {why}")


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}", flush=True)


def main(arguments: Sequence[str] = ()) -> int:
    """Run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m tasks.wal.archiver", description=__doc__)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--keep-segments", type=int, default=KEEP_SEGMENTS)
    given = parser.parse_args(arguments or None)
    try:
        env = Environment.find(given.environment)
        archiver = WalArchiver(
            Path(env.wal.directory),
            destinations_of(env),
            given.keep_segments,
            partial(containment.is_here, env.name, env.reports_directory),
        )
        for which in get_args(Stores):
            if env.has(which) and not (root := env.stores(which).wal).startswith("s3://"):
                for directory in Path(root).glob(f"{env.name}/*"):
                    DirectoryPlace(directory).sweep()
    except OpsError as error:
        _say(str(error))
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: archiver.stop.set())
    _say(f"shipping {archiver.directory} to {', '.join(one.name for one in archiver.destinations)}")
    archiver.run()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
