"""Redis's settings as they run, as the next start would have them, and how a change of each takes effect (§2.3, §2.4).

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
from tasks.redis.settings.recommended import BY_NAME, DEFAULTS, LIMITS, MAXMEMORY, same

AT_ONCE, RESTART, PROTECTED = "at once", "restart", "restart (protected)"
NAMES = (*BY_NAME, MAXMEMORY)
# Immutable in every version: a CONFIG SET that names it too changes nothing, and says which of the two is at fault.
IMMUTABLE = "databases"


@dataclass(frozen=True)
class ServerSettings:
    """One server. `running` are the manual's settings and `others` all else that somebody may have set; `written` is
    what its next start would bring of both ({} and a `problem` where its file cannot be seen; without the others and an
    `others_problem` where only those are not known); `by` how a change of the manual's takes effect, {} where it could
    not be asked; `refused` which of the commands that change settings this user may not give; `most_files` how many its
    process may open, 0 where it is not on this host."""

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

    def is_written(self, name: str, value: str) -> bool:
        """Whether it runs with this value now."""
        return name in self.running and same(name, self.running[name], value)

    @property
    def keeps_nothing(self) -> bool:
        """Whether a kill or a shutdown loses all data: neither RDB nor AOF is written."""
        return not self.server.rules and not self.server.appendonly

    def unwritten(self) -> dict[str, tuple[str, str]]:
        """Settings that the next start would bring another value of → (what runs, what would)."""
        runs = {**self.running, **self.others}
        return {
            name: (runs[name], value)
            for name, value in self.written.items()
            if name in runs and not self._is_kept(name, runs[name])
        }

    def _is_kept(self, name: str, value: str) -> bool:
        written = self.written[name]
        if name == "dir":  # relative to where it was started, or removed: judged with the data directory
            return not value or not Path(written).is_absolute() or Path(written).resolve() == Path(value).resolve()
        return same(name, written, value)


@probe
def read_settings(block: Redis, environment: str) -> ServerSettings:
    """Every setting of §2.3 and §2.4, and maxmemory; and what else was set at run time. How a change takes effect is
    asked for by a CONFIG SET of the value that runs, together with one that every version refuses: nothing is set.

    Raises:
        Unreachable: it does not answer.
        OpsError: it refuses the password or a command that only reads.
    """
    server = ask(block)
    with connected(block) as client:
        running = {str(name): str(value) for name, value in client.config_get(*NAMES, IMMUTABLE).items()}
        databases = running.pop(IMMUTABLE)
        by, refused = _how(client, block, running, databases)
        others = settings_of(client)
        info: dict[str, Any] = client.info("clients")
    file, problem = find_written(server, {**DEFAULTS, **LIMITS})
    beside, others_problem = ({}, "") if problem else find_next(block, server)
    return ServerSettings(
        identity=f"redis {environment} {server.address}",
        server=server,
        running=running,
        written={**{name: file[name] for name in NAMES if name in file}, **beside},
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
    """The most that the process may ever open: a server that is not root cannot raise it."""
    if inspect_place(server).problem:
        return 0
    try:
        text = Path(f"/proc/{server.process}/limits").read_text()
    except OSError:
        return 0
    found = re.search(r"^Max open files\s+\S+\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
