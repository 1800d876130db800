"""The other side: the manual's own commands, as they stand there (§1.2, §8.2)."""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import redis

from benchmarks.place import DATABASE, Place
from lab.lifecycle import existing
from lab.state.base import PYTHON
from runbook import shell
from runbook.errors import OpsError
from runbook.wait import until
from tasks.postgres.dump.compression import compressing
from tasks.postgres.dump.dump import NICE

SCRIPT = Path(__file__).parent / "disaster_recovery.sh"
DATE = "20261125"


@dataclass(frozen=True)
class Recovered:
    """One run of disaster_recovery.sh, and how much of it was its `sleep 10`."""

    seconds: float
    slept_seconds: float


@dataclass(frozen=True)
class Peers:
    """The manual's commands on the bench lab; what they write is kept in one directory."""

    place: Place

    @property
    def directory(self) -> Path:
        """`/backup` of the manual."""
        return Path(self.place.status["root"]) / "peer"

    @property
    def dump(self) -> Path:
        """What pg_dump wrote last."""
        return self.directory / f"backup_{DATE}.dump"

    def environment(self) -> dict[str, str]:
        """For libpq's programs."""
        services, _ = existing(self.place.lab.name)
        return {
            "PATH": f"{self.place.status['postgres']['bin']}:{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(services.state.ports.postgres),
            "PGUSER": "postgres",
            "PGPASSWORD": services.state.passwords.postgres_admin,
        }

    def back_up(self) -> float:
        """§1.2: `pg_dump -F c -b -v`; returns its seconds."""
        self.directory.mkdir(exist_ok=True)
        argv = ["pg_dump", "-U", "postgres", "-d", DATABASE, "-F", "c", "-b", "-v", "-f", str(self.dump)]
        return self.run(argv)

    def restore(self) -> float:
        """§1.2: `pg_restore -d grc_db_new -v`; returns its seconds, without creating the database."""
        other = f"{DATABASE}_new"
        self.place.sql(f"DROP DATABASE IF EXISTS {other}")
        self.place.sql(f"CREATE DATABASE {other} TEMPLATE template0")
        try:
            return self.run(["pg_restore", "-U", "postgres", "-d", other, "-v", str(self.dump)])
        finally:
            self.place.sql(f"DROP DATABASE {other} WITH (FORCE)")

    def dump_alone(self, jobs: int, compression: str) -> float:
        """Our own dump without its manifest, compressed as ours is; returns its seconds."""
        target = self.directory / "alone"
        shutil.rmtree(target, ignore_errors=True)
        argv = [
            *("pg_dump", "--format=directory", f"--jobs={jobs}", f"--compress={compression}", "--no-sync"),
            *("--lock-wait-timeout=60s", "--large-objects", f"--file={target}", DATABASE),
        ]
        if compression != "0":
            return self.run(argv)
        started = time.monotonic()
        with compressing(target, jobs, NICE):
            self.run(argv)
        return time.monotonic() - started

    def save_redis(self) -> None:
        """§2.3: BGSAVE, then the file is copied."""
        with redis.Redis.from_url(self.place.status["redis"]["url"]) as client:
            client.bgsave()
            until(lambda: _is_saved(client), what="BGSAVE's end", seconds=60)
            set_to = client.config_get("dir", "dbfilename")
        shutil.copy(Path(set_to["dir"]) / set_to["dbfilename"], self.directory / f"dump_{DATE}.rdb")

    def recover(self) -> Recovered:
        """§8.2: disaster_recovery.sh."""
        services, _ = existing(self.place.lab.name)
        state = services.state
        login = f"ops:{state.passwords.supervisor}".encode()
        environment = {
            **self.environment(),
            "BACKUP_DIRECTORY": str(self.directory),
            "REDIS_DATA": str(services.layout.redis_data),
            "REDIS_OWNER": services.account.name,
            "BACKEND_DIRECTORY": str(services.layout.application / "backend"),
            "BACKEND_PORT": str(state.ports.backend),
            "SUPERVISOR_PORT": str(state.ports.supervisor),
            "SUPERVISOR_LOGIN": base64.b64encode(login).decode(),
            "PYTHON": str(PYTHON),
        }
        done = shell.run([SCRIPT, DATE], environment=environment)
        self.place.require_healthy()
        began, ended = re.findall(r"^slept ([\d.]+) ([\d.]+)$", done.stdout, re.MULTILINE)[0]
        return Recovered(done.seconds, float(ended) - float(began))

    def run(self, argv: list[str]) -> float:
        """One of libpq's programs; returns its seconds."""
        return shell.run(
            [shutil.which(argv[0], path=self.environment()["PATH"]) or argv[0], *argv[1:]],
            environment=self.environment(),
        ).seconds


def _is_saved(client: redis.Redis) -> bool:
    """`rdb_saves` does not tell: it counts a save when it begins."""
    found = client.info("persistence")
    if found["rdb_last_bgsave_status"] != "ok":
        raise OpsError("BGSAVE failed", "check Redis's log")
    return not found["rdb_bgsave_in_progress"]
