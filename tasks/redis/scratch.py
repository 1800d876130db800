"""A scratch server: the block's own server program on a Unix socket, to prove a file's content."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook import shell
from runbook.errors import OTHER_BACKUPS, Unreachable, VerificationFailed
from runbook.files import inside
from runbook.wait import until
from tasks.redis.scratch_place import SOCKETS, scratch_place
from tasks.redis.server import LOAD_SECONDS, at_once, call

# If memory runs out, the kernel kills a scratch server first, never the live server.
_SETTINGS = (
    *("--port", "0", "--unixsocketperm", "700", "--daemonize", "no", "--logfile", "", "--pidfile", ""),
    *("--save", "", "--databases", "1024", "--enable-debug-command", "yes", "--busy-reply-threshold", "600000"),
    *("--oom-score-adj", "absolute", "--oom-score-adj-values", "1000", "1000", "1000", "--auto-aof-rewrite-percentage"),
    "0",
)
_UNTOLD = re.compile(r"check server logs|Terminating server|Memory overcommit|oO0Oo|Transparent Huge|TCP backlog")
_WHERE = re.compile(r"^Internal error in RDB .*? -> ")  # a line of the server's own code


@contextlib.contextmanager
def scratch_server(
    block: Redis,
    directory: Path,
    *,
    appendonly: bool = False,
    rdb: str = "dump.rdb",
    aof: tuple[str, str] = ("appendonlydir", "appendonly.aof"),
    user: str = "",
) -> Iterator[redis.Redis]:
    """A server on `directory`, loaded: on its RDB, or (`appendonly`) on its AOF (directory and file name in `aof`).

    Without `user` it runs as this process's user. It listens only on a socket in a private directory, and saves nothing
    automatically. It is shut down without saving at the end of the block, and dies with this process.

    Raises:
        VerificationFailed: the files cannot be loaded; the message is the server's own reason.
    """
    with scratch_place(SOCKETS) as place:
        if user and os.geteuid() == 0:
            inside.give(place, shell.owner_of(user))
        log = place / "log"
        argv: list[str | Path] = [
            block.server_program,
            *_SETTINGS,
            "--unixsocket",
            place / "socket",
            "--dir",
            directory,
        ]
        argv += ["--dbfilename", rdb, "--appendonly", "yes" if appendonly else "no"]
        argv += ["--appenddirname", aof[0], "--appendfilename", aof[1]]
        # LC_ALL: the scripts sort by the server's collation.
        with (
            inside.creating(log) as out,
            shell.spawn(argv, environment={"LC_ALL": "C"}, user=user, stdout=out, stderr=out) as child,
            contextlib.closing(at_once(block.scratch(place / "socket"))) as client,
        ):
            until(
                lambda: _is_loaded(client, child, log),
                what="loading on the scratch server",
                seconds=LOAD_SECONDS,
                every_seconds=0.03,
            )
            yield client
            if child.poll() is None:
                end(client, child, save=False)


def end(client: redis.Redis, child: subprocess.Popen[bytes] | None = None, *, save: bool) -> None:
    """SHUTDOWN, which the server answers by closing the connection.

    Raises:
        VerificationFailed: the server refused (it could not save).
    """
    try:
        call(client, "SHUTDOWN", "SAVE" if save else "NOSAVE")
    except redis.ConnectionError:
        pass
    except redis.RedisError as error:
        raise VerificationFailed(f"the scratch server does not shut down: {error}", "check the disk") from None
    if child:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(shell.STOP_SECONDS)


def _is_loaded(client: redis.Redis, child: subprocess.Popen[bytes], log: Path) -> bool:
    if child.poll() is not None:
        raise VerificationFailed(
            f"the server cannot load this data: {reason(inside.read_text(log, 'replace'), child.returncode)}",
            f"load it with a server program of the version that took it ([redis] server_program); {OTHER_BACKUPS}",
        )
    try:
        info = client.info("persistence")
    except redis.RedisError as error:
        raise Unreachable(f"the scratch server does not answer yet: {error}") from None
    return not info["loading"]


def reason(log: str, code: int) -> str:
    """The line of a server's log with the reason of its exit."""
    lines = [line for line in log.splitlines() if not _UNTOLD.search(line)]
    reasons = [line.split(" # ", 1)[1] for line in lines if " # " in line]
    reasons += [line for line in lines if re.match(r"(\*\*\* FATAL|>>> |Bad file format|.*(?:denied|not found))", line)]
    if reasons:
        return _WHERE.sub("", reasons[0]).rstrip(".")[:300]
    return f"it was killed by signal {-code} (out of memory?)" if code < 0 else f"it exited {code}"


def refuse_empty(path: Path) -> None:
    """Refuse a missing or empty RDB: a server would start without data.

    Raises:
        VerificationFailed: the file is missing or has no content.
    """
    if not path.is_file() or not path.stat().st_size:
        raise VerificationFailed(f"{path.name} is missing or empty", OTHER_BACKUPS)
