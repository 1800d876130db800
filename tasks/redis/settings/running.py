"""The running settings, those after the next start, and how a change takes effect (§2.3, §2.4).

https://valkey.io/commands/config-get/ and https://valkey.io/topics/valkey.conf/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.redis.persistence.place import inspect_place
from tasks.redis.persistence.state import Persistence, ask
from tasks.redis.persistence.written import find_written
from tasks.redis.rights import find_refused
from tasks.redis.server import call, connected
from tasks.redis.settings.next_start import find_next, settings_of
from tasks.redis.settings.recommended import BY_NAME, DEFAULTS, LIMITS, MAXMEMORY, same, shown

AT_ONCE, RESTART, PROTECTED = "at once", "restart", "restart (protected)"
NAMES = (*BY_NAME, MAXMEMORY)
# Immutable in every version: a CONFIG SET that also names it changes nothing, and names the setting that it refuses.
IMMUTABLE = "databases"


@dataclass(frozen=True)
class RedisServerSettings:
    """One server's settings. `running`: the manual's; `others`: all others that can be set at run time. `written`: both
    after the next start; {} with a `problem` if its file cannot be read, without the others with an `others_problem`.
    `by`: how a change takes effect; {}: unknown. `refused`: the commands that this user may not run. `most_files`: the
    open files of its process; 0: it is on another host."""

    identity: str
    server: Persistence
    running: Mapping[str, str]
    written: Mapping[str, str]
    problem: str
    by: Mapping[str, str]
    connections: int
    most_files: int = 0
    others: Mapping[str, str] = field(default_factory=dict)
    others_problem: str = ""
    refused: tuple[OpsError, ...] = field(default=(), compare=False)

    @property
    def address(self) -> str:
        """`host:port`."""
        return self.server.address

    @property
    def role(self) -> str:
        """`master` or `slave`."""
        return self.server.state.role

    def is_written(self, name: str, value: str | None) -> bool:
        """Whether the server runs with this value now; nothing written is the empty value."""
        return name in self.running and same(name, self.running[name], value or "")

    def shown(self, name: str, value: str | None = None) -> str:
        """The value with its unit, by default the running one."""
        return shown(name, value if value is not None else self.running.get(name, "unknown"))

    @property
    def keeps_nothing(self) -> bool:
        """Whether a kill or a shutdown loses all data: neither RDB nor AOF is saved."""
        return not self.server.rules and not self.server.appendonly

    def unwritten(self) -> dict[str, tuple[str, str]]:
        """Settings that the next start would change → (running value, value after a start)."""
        runs = {**self.running, **self.others}
        return {
            name: (runs[name], value)
            for name, value in self.written.items()
            if name in runs and not self._is_kept(name, runs[name])
        }

    def _is_kept(self, name: str, value: str) -> bool:
        written = self.written[name]
        if name == "dir":  # relative to its start directory, or deleted: judged with the data directory
            return not value or not Path(written).is_absolute() or Path(written).resolve() == Path(value).resolve()
        return same(name, written, value)


def differences(unwritten: Mapping[str, tuple[str, str]]) -> list[str]:
    """For each setting: `save off runs, 900 1 is written`."""
    return [
        f"{name} {shown(name, runs)} runs, {shown(name, file)} is written" for name, (runs, file) in unwritten.items()
    ]


@probe
def read_settings(block: Redis, environment: str) -> RedisServerSettings:
    """The settings of §2.3 and §2.4, maxmemory, and others that were set at run time. To find out how a change takes
    effect, a CONFIG SET names the running value and an immutable setting, so that nothing is set.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses the password or a reading command.
    """
    return query_settings(block, environment)


def query_settings(block: Redis, environment: str = "") -> RedisServerSettings:
    """See `read_settings`."""
    server = ask(block)
    with connected(block) as client:
        running = {str(name): str(value) for name, value in client.config_get(*NAMES, IMMUTABLE).items()}
        databases = running.pop(IMMUTABLE)
        by, refused = _how(client, block, running, databases)
        others = settings_of(client)
        info: dict[str, Any] = client.info("clients")
    file, problem = find_written(server, {**DEFAULTS, **LIMITS})
    next_others, others_problem = ({}, "") if problem else find_next(block, server)
    return RedisServerSettings(
        identity=f"redis {environment} {server.address}",
        server=server,
        running=running,
        written={**{name: file[name] for name in NAMES if name in file}, **next_others},
        problem=problem,
        by=by,
        connections=int(info["connected_clients"]) + server.replicas,
        most_files=_most_files(server),
        others=others,
        others_problem=others_problem,
        refused=tuple(refused),
    )


def _how(
    client: redis.Redis, block: Redis, running: Mapping[str, str], databases: str
) -> tuple[dict[str, str], list[OpsError]]:
    by: dict[str, str] = {}
    refused = find_refused(client, block, ("CONFIG", "REWRITE"))
    for name, value in running.items():
        try:
            call(client, "CONFIG", "SET", name, value, IMMUTABLE, databases)
        except redis.exceptions.NoPermissionError as error:
            return {}, [block.refused(error), *refused]
        except redis.ResponseError as error:
            said = str(error)
            if f"'{IMMUTABLE}'" in said:
                by[name] = AT_ONCE
            elif f"'{name}'" in said and "set" in said:
                by[name] = PROTECTED if "protected" in said else RESTART
    return by, refused


def _most_files(server: Persistence) -> int:
    """The process's hard limit of open files, which only root can raise."""
    if inspect_place(server).problem:
        return 0
    try:
        text = Path(f"/proc/{server.process}/limits").read_text()
    except OSError:
        return 0
    found = re.search(r"^Max open files\s+\S+\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
