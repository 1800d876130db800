"""A lab for tests and benchmarks: up, its variables, down."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from lab import lifecycle, region
from lab.control import LabControl
from lab.progress import Tell, silent
from lab.servers.replication import RECEIVER_PROGRAM
from lab.start import lose
from lab.state.base import create_base
from lab.state.status import read_status
from runbook.wait import until


@dataclass(frozen=True)
class Lab:
    """A lab by name, in the base directory that `OPS_LAB_BASE` says."""

    name: str

    @classmethod
    def prepared(cls, name: str) -> Lab:
        """Ports and passwords chosen, nothing started: `environ` can be exported before Prefect is imported."""
        lifecycle.prepare(name)
        LabControl.prepare(create_base())
        return cls(name)

    @classmethod
    def up(cls, name: str, megabytes: int, tell: Tell = silent, *, runbooks: bool = False) -> Lab:
        """Running, with data; with a worker and deployments only where `runbooks` are launched through Prefect.

        Raises:
            OpsError: a part does not come up.
        """
        lifecycle.up(name, tell, megabytes, runbooks=runbooks)
        return cls(name)

    def down(self, *, remove: bool = True, tell: Tell = silent) -> None:
        """Stopped, its data removed unless told otherwise. The Prefect server stays."""
        lifecycle.down(self.name, tell, remove=remove)

    def renew_standby(self) -> None:
        """A new standby and an empty receiver in the place of those that a recovery or a failover left behind, whose
        files are removed; commits wait for them again."""
        services, _ = lifecycle.existing(self.name)
        _, standby = services.nodes
        for program in (standby.program, RECEIVER_PROGRAM):
            services.supervisor.stop(program)
        for directory in (standby.data, services.layout.wal):
            shutil.rmtree(directory, ignore_errors=True)
        lifecycle.up(self.name, silent, runbooks=False)
        with psycopg.connect(services.admin_dsn, autocommit=True) as connection:
            loaded = "SELECT pg_conf_load_time()"  # of this session, to which the server passes it on
            before = connection.execute(loaded).fetchone()
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
            until(lambda: connection.execute(loaded).fetchone() != before, what="the reload", seconds=60)

    def lose(self) -> None:
        """The disaster: every process of it killed with -9, its supervisor first, so that nothing starts again. Its
        disks stay; `up` brings it back."""
        services, _ = lifecycle.existing(self.name)
        lose(services.layout)

    def region(self) -> Lab:
        """Its second region: `environ`, `status` and `logs` are that one's."""
        return Lab(f"{self.name}-dr")

    def empty_region(self) -> None:
        """The second region as it was prepared, after a failover to it, and the lab up: users are sent there again."""
        self.clear_region()
        lifecycle.up(self.name, silent, runbooks=False)

    def clear_region(self) -> None:
        """Everything of the second region stopped, its data removed, and users sent to the lab again, be it dead. The
        copies of backups stay."""
        services, _ = lifecycle.existing(self.name)
        second = lifecycle.second_region(services)
        second.supervisor.shutdown()
        layout = second.layout
        for data in (layout.postgres_data, layout.standby_data, layout.wal, layout.redis_data, layout.application):
            for path in data.parent.glob(f"{data.name}*"):  # and what recoveries kept aside
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for store in (layout, layout.first):  # of its own time
            shutil.rmtree(store.store("wal") / layout.name, ignore_errors=True)
        layout.endpoint.unlink(missing_ok=True)
        second.create_directories()
        region.bring_up(second, silent)
        region.send_users(services, second)

    def endpoint(self) -> str:
        """Where users are sent now."""
        return lifecycle.existing(self.name)[0].layout.endpoint.read_text().strip()

    def status(self) -> dict[str, Any]:
        """As `python -m lab status --json`."""
        return read_status(self.name)

    def environ(self) -> dict[str, str]:
        """As `python -m lab env`."""
        return lifecycle.variables(*lifecycle.existing(self.name))

    def logs(self) -> list[Path]:
        """The servers' logs, the application's, Prefect's."""
        services, control = lifecycle.existing(self.name)
        found = [*services.layout.logs.glob("*.log"), *services.layout.application_logs.glob("*.log")]
        worker = control.layout.logs / f"worker-{self.name}.log"
        return sorted(path for path in (*found, control.layout.logs / "server.log", worker) if path.exists())
