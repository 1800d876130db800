"""The servers of the small system: which there are, their configuration, and the environment's TOML."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from lab.processes import write
from lab.servers.postgres import ROLE
from lab.servers.supervision import Program
from tests.fixtures.postgres.clusters import PROGRAMS, Cluster
from tests.fixtures.postgres.templates import Template

REPLICA = "redis-replica"
SERVICES = {**PROGRAMS, "redis": "redis", REPLICA: REPLICA}
SETTINGS = (
    *("max_prepared_transactions = 5", "fsync = off", "full_page_writes = on", "wal_level = logical"),
    *("max_wal_size = 2GB", "checkpoint_timeout = 1h"),
)
REDIS_TOML = """
[redis]
port = {port}
password_env = "PAIR_REDIS_PASSWORD"
data_directory = "{data}"
config_file = "{conf}"
server_program = "{program}"
os_user = "{user}"
{more}
[application]
directory = "{files}"
"""
REDIS_CONF = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{data}"
appendonly yes
appendfsync everysec
save 900 1
masterauth {password}
repl-diskless-sync-delay 0
"""


@dataclass(frozen=True)
class Variant:
    """Which system. `owner`: of the application's database; `replica`: of Redis."""

    standby: bool = True
    other: bool = False
    owner: str = ROLE
    replica: bool = False

    @property
    def roles(self) -> set[str]:
        """Its services."""
        return {"postgres", "receiver", "redis", *["standby"] * self.standby, *[REPLICA] * self.replica}

    @property
    def name(self) -> str:
        """For a round's line."""
        return "+".join(
            [
                *("pg", *["standby"] * self.standby, *["other"] * self.other),
                *(*["owner:postgres"] * (self.owner != ROLE), *["replica"] * self.replica),
            ]
        )


class SmallSystem(Cluster):
    """The fixture's cluster with a Redis, and a TOML that describes what the variant has."""

    def __init__(self, template: Template, variant: Variant) -> None:
        self.variant = variant
        alone = () if variant.standby else ("synchronous_standby_names = 'receiver'",)
        super().__init__(template, settings=(*SETTINGS, *alone))

    def _configure(self) -> None:
        self.redis_conf = self.layout.valkey_conf
        servers = {"redis": (self.redis_conf, self.layout.redis_data, self.state.ports.redis)}
        if self.variant.replica:
            servers[REPLICA] = self.layout.replica_conf, self.layout.replica_data, self.state.ports.redis_replica
        user = self.account.name if self.account.is_other else ""
        self._programs = [
            Program(name, (self.binaries.redis, conf), data.parent, user=user)
            for name, (conf, data, _) in servers.items()
        ]
        for _, data, _ in servers.values():
            self.account.directory(data.parent, 0o755)
            self.account.directory(data, 0o750)
        super()._configure()
        for name, (conf, data, port) in servers.items():
            text = REDIS_CONF.format(port=port, password=self.state.passwords.redis, data=data)
            text += f"replicaof 127.0.0.1 {self.state.ports.redis}\n" if name == REPLICA else ""
            write(conf, text, 0o600, self.account)

    def _describe(self) -> None:
        super()._describe()
        shutil.rmtree(self.root / "opt")
        toml = self.root / "pair.toml"
        sections = toml.read_text().split("\n[")
        left_out = ["application]", "logs]", *["standby]"] * (not self.variant.standby)]
        text = "\n[".join(one for one in sections if not one.startswith(tuple(left_out)))
        if not self.variant.standby:
            text = text.replace('name = "standby"\nslot = "standby"\n', "").replace(
                'standby = "postgresql-standby"\n', ""
            )
        toml.write_text(
            text
            + REDIS_TOML.format(
                port=self.state.ports.redis,
                data=self.layout.redis_data,
                conf=self.redis_conf,
                program=self.binaries.redis,
                user=self.account.name,
                more=f'replicas = ["127.0.0.1:{self.state.ports.redis_replica}"]' if self.variant.replica else "",
                files=self.root / "app" / "files",
            )
        )
