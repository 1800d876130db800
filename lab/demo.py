"""`make demo`: the main job for real, on the lab. Back everything up, write on, destroy it, restore it, prove it.

It knows no flow: it launches deployments on the worker, as a person does in the UI, and reads the report they leave.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import redis
from psycopg import sql

from blocks.config import toml
from blocks.places import Application
from lab.client import Lab
from lab.progress import Tell, progress
from lab.proof import Proof, find_report
from lab.redis_ledger import RedisLoss, RedisWriter
from lab.runs import Run, Runs
from lab.servers import postgres
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.drill.ledger import WriteLedger
from tasks.drill.lost_writes import LedgerResult, find_lost_writes
from tasks.drill.writer import Writer

BACKUPS = ("backup-cluster", "backup-database", "backup-redis", "backup-files")
RESTORE = "full-restore"
REJOIN = "rejoin-standby"
WRITES_PER_SECOND = 8.0
BEFORE_SECONDS, AFTER_SECONDS = 2.0, 8.0
KILLED = ("grc-backend", "grc-frontend", "redis")


def described_application(lab: Lab) -> Application:
    """The application as the lab's TOML describes it."""
    before = dict(os.environ)
    os.environ.update(lab.environ())
    try:
        return toml.environment(lab.name).application
    finally:
        for name in lab.environ().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def newest_snapshot(store: Path) -> datetime:
    """When the newest backup in a directory was taken, by its manifest."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in store.glob("*/manifest.json")]
    return max(datetime.fromisoformat(manifest["taken"]) for manifest in manifests)


@dataclass
class Demo:
    """One demonstration on one lab."""

    lab: Lab
    tell: Tell
    status: dict[str, Any]
    runs: Runs
    ledger: WriteLedger
    redis: RedisWriter
    destroyed: bool = False
    backups_began: datetime = field(default_factory=lambda: datetime.now(UTC))
    redis_snapshot: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def on(cls, name: str, tell: Tell) -> Demo:
        """On a lab that is up.

        Raises:
            OpsError: it is not.
        """
        lab = Lab(name)
        status = lab.status()
        if not status["running"]:
            raise OpsError(f"the lab {name} is down", f"bring it up: python -m lab up --name {name}")
        ledger = Path(status["root"]) / "demo" / f"writes-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"
        writer = RedisWriter(
            lambda: str(lab.status()["redis"]["url"]), ledger.with_suffix(".redis.jsonl"), WRITES_PER_SECOND
        )
        runs = Runs(status["prefect_api"], status["prefect_ui"], status["prefect_auth"])
        return cls(lab, tell, status, runs, WriteLedger(ledger), writer)

    def play(self) -> Proof:
        """The whole story; the proof says how it ended.

        Raises:
            OpsError: a backup failed, or something did not answer.
        """
        self.back_up_and_write_on()
        self.destroy()
        launched = datetime.now(UTC)
        run = self.restore()
        report = find_report(Path(self.status["stores"]["reports"]), since=launched)
        if report is None:
            raise OpsError(f"{RESTORE} left no report: {run.state} {run.message}", self.ending(run))
        lost = self.count_lost()
        return Proof(run, report, self.health(), self.ledger, lost, self.backups_began, self.count_lost_in_redis())

    def back_up_and_write_on(self) -> None:
        """A client writes before, during and after the backups."""
        application = described_application(self.lab)
        self.tell(f"a client writes through {application.url}, {WRITES_PER_SECOND:g} writes a second; another to Redis")
        with Writer(application, self.ledger, per_second=WRITES_PER_SECOND), self.redis:
            self._let_write(BEFORE_SECONDS)
            self.backups_began = datetime.now(UTC)
            for flow in BACKUPS:
                self.back_up(flow)
            self.redis_snapshot = newest_snapshot(Path(self.status["stores"]["redis"]))
            self.tell(f"the client writes on for {AFTER_SECONDS:g} s after the backups")
            self._let_write(AFTER_SECONDS)
        counted = len(self.ledger.acknowledged())
        before = len(self.ledger.acknowledged(before=self.backups_began))
        self.tell(f"{counted} writes acknowledged, {before} of them before the first backup")

    def _let_write(self, seconds: float) -> None:
        """Until as many writes are acknowledged as the client sends in so many seconds, be the machine busy."""
        wanted = len(self.ledger.acknowledged()) + int(seconds * WRITES_PER_SECOND)
        until(lambda: len(self.ledger.acknowledged()) >= wanted, what="the client's writes", seconds=120)

    def back_up(self, flow: str) -> None:
        """One backup through its deployment."""
        run = self.runs.run(f"{flow}/{self.lab.name}", {"environment": self.lab.name})
        if not run.completed:
            raise OpsError(f"{flow} ended {run.state}: {run.message}", self.ending(run))
        self.tell(f"{flow}: done in {run.seconds:.1f} s")

    def destroy(self) -> None:
        """Drop the database, remove Redis' data, kill the services; nothing is simulated."""
        self.destroyed = True
        name = sql.Identifier(postgres.DATABASE)

        def drop() -> bool:
            try:
                with psycopg.connect(self.status["postgres"]["admin_dsn"], autocommit=True) as connection:
                    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
            except psycopg.errors.ObjectInUse as error:  # somebody connected again just now
                raise Unreachable(str(error).splitlines()[0]) from None
            return True

        until(drop, what=f"the drop of {postgres.DATABASE}", seconds=120)
        self.tell(f"DESTROYED: database {postgres.DATABASE} dropped")
        data = Path(self.status["redis"]["data"])
        shutil.rmtree(data, ignore_errors=True)  # it writes while its files go
        for service in KILLED:
            if pid := self.lab.status()["services"][service]["pid"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(data, ignore_errors=True)
        self.tell(f"DESTROYED: Redis' data directory removed; {', '.join(KILLED)} killed with -9")
        with contextlib.suppress(Unreachable):  # that nobody answers is a bad health as well
            until(lambda: "503" in self.health(), what="the backend's restart", seconds=10)
        self.tell(f"the application says: {self.health()}")

    def restore(self) -> Run:
        """The recovery as an operator launches it, watched."""
        name = self.lab.name
        self.tell(f"launching {RESTORE}/{name} with confirm={name} on the worker")
        run = self.runs.run(f"{RESTORE}/{name}", {"environment": name, "confirm": name}, self.tell)
        self.tell(f"{RESTORE}: {run.state} after {run.seconds:.1f} s, the start of its process included")
        return run

    def health(self) -> str:
        """What `/health` answers now: `200 {…}`."""
        try:
            answer = httpx.get(f"{self.status['application']['url']}/health", timeout=5, trust_env=False)
        except httpx.HTTPError as error:
            return f"no answer ({type(error).__name__})"
        return f"{answer.status_code} {answer.text}"

    def count_lost(self) -> LedgerResult | None:
        """What the ledger says; None where the database cannot be asked."""
        try:
            return find_lost_writes(self.ledger, self.status["postgres"]["dsn"], described_application(self.lab))
        except psycopg.Error:
            return None

    def count_lost_in_redis(self) -> RedisLoss | None:
        """What the ledger of the Redis client says; None where Redis does not answer."""
        try:
            return self.redis.loss(self.redis_snapshot)
        except redis.RedisError:
            return None

    def rejoin_standby(self, proof: Proof) -> None:
        """What the report asks for after a restore of the cluster: until then there is no server to fail over to.

        Raises:
            OpsError: it cannot be launched, or does not end.
        """
        follow = {one["flow"] for finding in proof.report["findings"] for one in finding["follow"]}
        if REJOIN not in follow:
            return
        run = self.runs.run(f"{REJOIN}/{self.lab.name}", {"environment": self.lab.name, "confirm": self.lab.name})
        self.tell(f"{REJOIN}, as the report asks for: {run.state} after {run.seconds:.1f} s")

    def links(self, run: Run) -> list[str]:
        """Where to look in the UI."""
        return [self.runs.link(run.id), *self.runs.artifact_links(run.id)]

    def ending(self, run: Run) -> str:
        """What to say of a run that ended badly."""
        return f"see {self.runs.link(run.id)}; its last lines:\n" + "\n".join(run.lines[-12:])


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 only when the restore was proven."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description="back up, destroy, restore, prove")
    parser.add_argument("--name", default="lab", help="the environment's name (default: lab)")
    parser.add_argument("--since", type=float, metavar="EPOCH", default=time.time(), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    demo = None
    try:
        demo = Demo.on(chosen.name, progress())
        proof = demo.play()
        with contextlib.suppress(OpsError):
            demo.rejoin_standby(proof)
        problems = proof.problems()
        print(f"\n{proof.text(demo.links(proof.run))}\n")
        for problem in problems:
            print(f"NOT PROVEN: {problem}", file=sys.stderr)
        if problems:
            print(demo.ending(proof.run), file=sys.stderr)
        print(f"{'NOT PROVEN' if problems else 'PROVEN'} after {time.time() - chosen.since:.0f} s in all")
        return 1 if problems else 0
    except (OpsError, OSError, psycopg.Error, httpx.HTTPError) as error:
        print(f"\n{error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    if demo and demo.destroyed:
        print(
            f"The lab's data is destroyed: launch {RESTORE}/{chosen.name} with confirm={chosen.name} in the UI, "
            f"{demo.status['prefect_ui']}/deployments",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
