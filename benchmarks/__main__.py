"""`make bench`."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psycopg

from benchmarks.figures import as_table, write_json
from benchmarks.place import GROWN_RATIO, SPACE_RATIO, Called, place
from benchmarks.quiet import Calibration, calibrate
from lab.progress import progress
from runbook.errors import OpsError
from runbook.page.render import table

if TYPE_CHECKING:
    from benchmarks.suite import Suite

LONGEST_STEPS = 14
FIRST = 0.1
"""Of the megabytes, in the chapter of growth."""


def main() -> int:
    """0 also where a bar is missed: it is a measurement. 1 where it could not be measured, with what was until then."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="both sides of every ratio, in one run")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the database (default: 1000)")
    parser.add_argument(
        "--only",
        choices=["chapter", "redis", "recovery", "estimate", "logs", "growth", "tables", "deployments"],
        default="",
        help="one chapter alone: §1, §2, §8, §6; of §8 the estimate of the RTO (with --megabytes 10000, say); growth: "
        "a tenth of the megabytes and all of them; tables: 5,000 more; deployments: of the runbooks, and clicks",
    )
    parser.add_argument("--environments", type=int, default=1, help="with --only deployments: on one server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    chosen = parser.parse_args()
    suite: Suite | None = None
    before = calibrate()
    print(f"The machine: {before}", file=sys.stderr, flush=True)
    tell = progress(lambda line: print(line, file=sys.stderr, flush=True))
    try:
        if chosen.only == "redis":
            from benchmarks.redis_chapter import RedisChapter  # it imports Prefect, too

            print(as_table(RedisChapter(tell).figures()))
            return 0
        if chosen.only == "logs":
            from benchmarks.logs_chapter import LogsChapter  # its flows import Prefect in processes of their own

            print(as_table(LogsChapter(tell).figures()))
            return 0
        share, ratio = (FIRST, GROWN_RATIO) if chosen.only == "growth" else (1, SPACE_RATIO)
        with place(chosen.megabytes, tell, share=share, ratio=ratio) as up:
            from prefect.context import refresh_global_settings_context

            from benchmarks.suite import Suite

            refresh_global_settings_context()  # Prefect has read its settings before: it is imported for a table
            suite = Suite(up(), os.environ["OPS_APPLICATION_PASSWORD"])
            suite.run(chosen.only, chosen.megabytes, chosen.environments)
    except (OpsError, psycopg.Error, httpx.HTTPError, OSError) as error:
        print(error, file=sys.stderr)
        if suite and suite.figures:
            _show(suite, chosen.megabytes, before, chosen.json)
        return 1
    except KeyboardInterrupt:
        return 130
    _show(suite, chosen.megabytes, before, chosen.json)
    return 0


def _show(suite: Suite, megabytes: int, before: Calibration, path: Path | None) -> None:
    print(f"{megabytes} MB of data, medians. The machine before: {before}. After: {calibrate(judges_load=False)}.\n")
    print(f"{as_table(suite.figures)}\n")
    if suite.profile:
        print(f"Where a full restore spends its time:\n\n{_profile(suite.profile)}\n")
    missed = [figure.name for figure in suite.figures if figure.holds is False]
    print(f"{len(missed)} bars are missed: {'; '.join(missed)}" if missed else "every bar holds")
    if path:
        write_json(path, suite.figures)


def _profile(calls: Sequence[Called]) -> str:
    names = list(dict.fromkeys(name for call in calls for name, _, _ in call.steps))
    took = {name: statistics.median(call.step(name) for call in calls) for name in names}
    began = {name: min(at for call in calls for step, at, _ in call.steps if step == name) for name in names}
    longest = sorted(names, key=lambda name: -took[name])[:LONGEST_STEPS]
    rows = [(name, f"{began[name]:.1f}", f"{took[name]:.2f}") for name in sorted(longest, key=lambda name: began[name])]
    return table(("step", "begins after s", "takes s"), rows)


if __name__ == "__main__":
    sys.exit(main())
