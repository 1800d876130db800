"""A server's other settings after its next start, found out with its own program (§2.3).

A scratch server is started with the configuration file's values: it knows defaults, older names, and the form of a
value. CONFIG REWRITE saves every difference between these and the running settings.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.redis.persistence.state import Persistence
from tasks.redis.scratch import reason
from tasks.redis.scratch_place import SOCKETS, scratch_place
from tasks.redis.server import at_once, call, version_of
from tasks.redis.settings.file import read_configuration
from tasks.redis.settings.recommended import DEFAULTS, LIMITS

START_SECONDS = 60.0
# Reported elsewhere (the manual's), or unsuitable for a scratch server: ports and sockets, files, other servers,
# passwords and users, processors, and settings that only a start can change.
_APART = re.compile(
    r"port|unixsocket.*|tls-.*|rdma-.*|.*mptcp|socket-mark-id|tcp-backlog|daemonize|supervised|pidfile|syslog-.*|.*file"
    r"|.*filename|user|requirepass|(master|primary)auth|.*-pass|replicaof|slaveof|cluster-.*|(load)?module.*"
    r"|rename-command|.*cpulist|oom-.*|.*proc-title.*|include|sentinel|databases|enable-.*|locale-collate|io-threads"
    r"|hash-seed|ignore-warnings|always-show-logo"
)
_OLDER = {"slave": "replica", "ziplist": "listpack", "masteruser": "primaryuser"}
_OLD_NAMES = {
    "lua-time-limit": "busy-reply-threshold",
    "slowlog-log-slower-than": "commandlog-execution-slower-than",
    "slowlog-max-len": "commandlog-slow-execution-max-len",
}
_OWN = """
port 0
unixsocket {place}/socket
unixsocketperm 700
dir {place}
logfile ""
daemonize no
save ""
appendonly no
oom-score-adj absolute
oom-score-adj-values 1000 1000 1000
"""


def settings_of(client: redis.Redis) -> dict[str, str]:
    """CONFIG GET * without settings that are reported elsewhere and without secrets, by their current names.

    Raises:
        redis.RedisError: as it is.
    """
    answer = call(client, "CONFIG GET", "*")
    pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
    found = {_text(name): _text(value) for name, value in pairs}
    return {name: value for name, value in found.items() if _is_compared(name) and _present(name, found) == name}


def find_next(block: Redis, server: Persistence) -> tuple[dict[str, str], str]:
    """The same settings after a start with the server's file; or {} and why they are unknown."""
    try:
        lines = read_configuration(Path(server.config_file)).lines
        found = [line for line in lines if _is_compared(line.split()[0].lower())]
        with started(block, "\n".join(found)) as client:
            if (version := version_of(client)) != server.version:
                return {}, f"{block.server_program} is {version}, and {server.version} runs"
            return settings_of(client), ""
    except (OpsError, redis.RedisError) as error:
        return {}, f"{block.server_program} cannot be queried: {getattr(error, 'message', error)}"


@contextlib.contextmanager
def started(block: Redis, text: str) -> Iterator[redis.Redis]:
    """A private scratch server with those lines, without data.

    Raises:
        OpsError: it does not start with these lines.
    """
    with scratch_place(SOCKETS) as place:
        (place / "conf").write_text(text + _OWN.format(place=place), encoding="utf-8", errors="surrogateescape")
        with (
            (place / "log").open("wb") as out,
            shell.spawn([block.server_program, place / "conf"], stdout=out, stderr=out) as child,
            contextlib.closing(at_once(block.scratch(place / "socket"))) as client,
        ):
            until(
                lambda: _answers(client, child, place / "log"),
                what="the answer of a scratch server",
                seconds=START_SECONDS,
                every_seconds=0.02,
            )
            yield client


def _answers(client: redis.Redis, child: subprocess.Popen[bytes], log: Path) -> bool:
    if child.poll() is not None:
        raise OpsError(reason(log.read_text(errors="replace"), child.returncode))
    try:
        return bool(client.ping())
    except (redis.AuthenticationError, redis.ResponseError):  # it answers, but needs a password, or refuses PING
        return True
    except redis.RedisError as error:
        raise Unreachable(str(error)) from None


def _is_compared(name: str) -> bool:
    return not _APART.fullmatch(name) and name not in DEFAULTS and name not in LIMITS


def _present(name: str, known: Mapping[str, str]) -> str:
    """A setting's current name: `slave-priority` is `replica-priority` if the server has both."""
    newer = _OLD_NAMES.get(name, name)
    for old, new in _OLDER.items():
        newer = newer.replace(old, new)
    return newer if newer in known else name


def _text(value: bytes | str) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
