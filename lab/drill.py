"""`make drill SCENARIO=data_corruption`: a DR drill of §8.4 on the lab, as a person launches it in the UI.

It knows no flow: it takes the backups that the drill wants to see, launches the drill on the worker, and reads the
report that it leaves.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from lab.client import Lab
from lab.progress import Tell, progress
from lab.proof import find_report
from lab.runs import Run, Runs
from runbook.errors import OpsError

RUNBOOK = "DR drill"
DRILL_SECONDS = 1800.0
_Backups = tuple[tuple[str, dict[str, str], str], ...]
CLUSTER: _Backups = (("backup-cluster", {"kind": "full"}, "cluster"),)
BACKUPS: dict[str, _Backups] = {
    "region_outage": (*CLUSTER, ("backup-redis", {}, "redis"), ("backup-files", {}, "files")),
    "bad_release": (),
    "full_restore": (("backup-database", {}, "postgres"), ("backup-redis", {}, "redis"), ("backup-files", {}, "files")),
}
REPLICATED = ("region_outage",)
"""These begin in the other region, with what was replicated there."""
SHOWN = (
    "scenario",
    "goal",
    "fault",
    "detected by",
    "diagnosis",
    "RTO",
    "RPO",
    "given up after the fault",
    "loss by the runbook",
    "to be verified",
    "ledgers",
    "overhead of the drill",
    "RTO of earlier drills",
)


def prepare(lab: Lab, runs: Runs, scenario: str, tell: Tell) -> None:
    """The preparation of §8.4: backups up to date, and each of them proven by a restore.

    Raises:
        OpsError: one of them failed.
    """
    wanted = [
        one
        for flow, parameters, kind in BACKUPS.get(scenario, CLUSTER)
        for one in ((flow, parameters), ("verify-backup", {"kind": kind}))
    ]
    for name, parameters in (*wanted, *([("replicate-backups", {})] if scenario in REPLICATED else [])):
        run = runs.run(f"{name}/{lab.name}", {"environment": lab.name, **parameters})
        if not run.completed:
            raise OpsError(f"{name} ended {run.state}: {run.message}", f"see {runs.link(run.id)}")
        tell(f"{' '.join((name, *parameters.values()))}: done in {run.seconds:.1f} s")


def hold(lab: Lab, scenario: str, participants: list[str], tell: Tell) -> tuple[Run, dict[str, Any] | None, list[str]]:
    """The drill, watched: its run, its report, and where to look in the UI.

    Raises:
        OpsError: the lab is down, or the preparation failed.
    """
    status = lab.status()
    if not status["running"]:
        raise OpsError(f"the lab {lab.name} is down", f"bring it up: python -m lab up --name {lab.name}")
    runs = Runs(status["prefect_api"], status["prefect_ui"], status["prefect_auth"])
    prepare(lab, runs, scenario, tell)
    launched = datetime.now(UTC)
    parameters = {"environment": lab.name, "scenario": scenario, "participants": participants, "confirm": lab.name}
    tell(f"launching run-drill/{lab.name} with scenario={scenario} on the worker")
    run = runs.run(f"run-drill/{lab.name}", parameters, tell, DRILL_SECONDS)
    report = find_report(Path(status["stores"]["reports"]), launched, RUNBOOK)
    return run, report, [runs.link(run.id), *runs.artifact_links(run.id)]


def text_of(report: dict[str, Any], path: Path, links: list[str]) -> str:
    """What a person reads first: the phases, the verdicts, what went wrong, and where the page is."""
    lines = [f"{name}: {report['facts'][name]}" for name in SHOWN if name in report["facts"]]
    for item in report["evidence"]:
        if item["name"] in ("Phases (§8.4)", "Ledger", "Negative controls", "Checks of phase 5"):
            lines += ["", item["name"], *("  " + " | ".join(row) for row in (item["columns"], *item["rows"]))]
    bad = [f for f in report["findings"] if f["status"] in ("WARN", "CRITICAL")]
    lines += ["", *(f"{f['status']}: {f['name']}: {f['value']} — {f['hint']}" for f in bad)]
    return "\n".join([*lines, f"page: {path}", *(f"look at it: {link}" for link in links)])


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 only when the drill was passed."""
    parser = argparse.ArgumentParser(prog="python -m lab.drill", description="prepare, break, recover, prove (§8.4)")
    parser.add_argument(
        "--scenario", required=True, help="database_failure, region_outage, data_corruption, full_restore, bad_release"
    )
    parser.add_argument("--participants", nargs="*", default=[], metavar="NAME", help="who takes part")
    parser.add_argument("--name", default="lab", help="the environment's name (default: lab)")
    parser.add_argument("--since", type=float, metavar="EPOCH", default=time.time(), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    try:
        run, report, links = hold(Lab(chosen.name), chosen.scenario, chosen.participants, progress())
    except (OpsError, OSError, httpx.HTTPError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: the drill goes on on the worker; see the runs of {chosen.name} in the UI", file=sys.stderr
        )
        return 1
    if report is None:
        print(f"run-drill left no report: {run.state} {run.message}; see {links[0]}", file=sys.stderr)
        return 1
    passed = run.completed and report["status"] in ("OK", "WARN")
    print(f"\n{text_of(report, Path(report['path']).with_suffix('.html'), links)}\n")
    print(f"{'PASSED' if passed else 'NOT PASSED'} after {time.time() - chosen.since:.0f} s in all")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
