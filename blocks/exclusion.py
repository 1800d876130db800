"""Locks on the servers and directories that a run changes: two environments that describe the same ones exclude each
other.

A session or an open file holds each lock, so it ends with its process, on any host and under any environment's name: a
PostgreSQL advisory lock in the cluster, a name on a Redis connection, `flock` on a directory and on a file next to it.
That file needs neither the server nor the directory, which may be what was lost. They are the second key besides the
environment's lock, and need no Prefect.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import psycopg
import redis
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute, refuse_pooler
from blocks.redis.server import Redis
from blocks.redis.servers import found_servers
from runbook.errors import Locked, LockLost, OpsError, Unreachable
from runbook.wait import until

SECONDS = 2
ENDING_SECONDS = 5.0
AGAIN_SECONDS = 10.0
"""So often a part that could not be locked is tried again: a dead host costs each try a time-out."""
PREFIX = "interview-ops-lock-"


class LockedPart(Protocol):
    """One server or directory."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def held(self) -> bool:
        """Whether it is locked now. A server that stopped frees its lock."""

    def identity(self) -> str:
        """The same for every description of it; "" where it cannot be reached."""

    def take(self) -> bool:
        """Lock it; False where it cannot be reached or locked from here.

        Raises:
            Locked: another run holds it.
            OpsError: what answers there cannot hold a lock.
        """

    def close(self) -> None:
        """Free it."""


class Cluster:
    """A PostgreSQL server, primary or standby. The key is the whole cluster, whichever database an environment names: a
    restore to a point in time replaces all of them."""

    def __init__(self, postgres: Postgres, run: str) -> None:
        self.postgres = postgres
        self.run = run
        self.name = f"{postgres.database} on {postgres.host}:{postgres.port}"
        self._session: Connection | None = None
        self._backend = 0

    @property
    def held(self) -> bool:
        """An idle session has nothing to read: what is there is its end."""
        if self._session is None or self._session.closed:
            return False
        with contextlib.suppress(psycopg.Error, OSError, ValueError):
            while select.select([self._session.pgconn.socket], [], [], 0)[0]:
                self._session.pgconn.consume_input()
            return bool(self._session.pgconn.status == psycopg.pq.ConnStatus.OK)
        return False

    def identity(self) -> str:
        try:
            with self.postgres.connect(seconds=SECONDS) as session:
                system = execute(session, "SELECT system_identifier FROM pg_control_system()")[0][0]
        except (OpsError, psycopg.Error):
            return ""
        return f"PostgreSQL {system} {self.postgres.database}"

    def take(self) -> bool:
        self.close()
        try:
            session = self.postgres.connect(seconds=SECONDS)
        except OpsError:
            return False
        self._session = session
        try:
            refuse_pooler(session)
            execute(session, sql.SQL("SET application_name = {}").format(sql.Literal(self.run[:63])))
            taken = execute(session, "SELECT pg_try_advisory_lock(%s)", _KEY)[0][0]
            rows = execute(session, _HOLDER, _KEY >> 32, _KEY & 0xFFFFFFFF)
        except psycopg.Error:
            self.close()
            return False
        if taken and not rows:
            self._backend = session.info.backend_pid
            return True
        self.close()
        if rows and rows[0][1] == self._backend:  # its own session, whose connection broke, has not ended yet
            return False
        raise _locked(self.name, f"“{rows[0][0]}”, session {rows[0][1]}" if rows else "another run")

    def close(self) -> None:
        if self._session is not None:
            with contextlib.suppress(psycopg.Error):
                self._session.close()
        self._session = None


_KEY = int.from_bytes(hashlib.sha256(b"interview-ops run").digest()[:8], "big") >> 1
# In any database: an advisory lock belongs to the one that its session is connected to, and two environments may name
# different ones as maintenance_database. Of two that take it at once there both may be refused, never none.
_HOLDER = """
SELECT a.application_name, a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.classid::bigint = %s AND l.objid::bigint = %s
  AND l.pid <> pg_backend_pid()
"""


class Keyspace:
    """A Redis server. A key would be part of the data that a restore swaps, and expire or stay; a connection's name
    ends with its process. Of two that take it at once both may be refused, never none. `token`: of the run, which may
    reach one server by two addresses."""

    def __init__(self, block: Redis, run: str, token: str = "") -> None:
        self.block = block
        self.name = f"Redis {block.address}"
        self._mine = f"{PREFIX}{token or secrets.token_hex(6)}:{_word(run)}".encode()
        self._client: redis.Redis | None = None

    @property
    def held(self) -> bool:
        """An idle connection has nothing to read: what is there is its end. (A hung server is not waited for.)"""
        connection = cast(Any, self._client).connection if self._client else None
        try:
            return bool(connection and connection.is_connected and not connection.can_read(timeout=0))
        except (redis.RedisError, OSError):
            return False

    def identity(self) -> str:
        try:
            with self.block.client(answer_seconds=SECONDS) as client:
                return f"Redis {cast(dict[str, Any], client.info('server'))['run_id']}"
        except (redis.RedisError, OSError, KeyError):
            return ""

    def take(self) -> bool:
        self.close()
        try:
            self._client = cast(Any, self.block.client(answer_seconds=SECONDS)).client()  # one connection, no pool
            self._ask("SETNAME", self._mine)
            listed = self._ask("LIST")
        except (redis.RedisError, OSError):
            self.close()
            return False
        others = [name for name in _names(listed) if name.startswith(PREFIX.encode()) and name != self._mine]
        if others:
            self.close()
            raise _locked(self.name, f"“{others[0].partition(b':')[2].decode(errors='replace')}”")
        return True

    def _ask(self, *words: str | bytes) -> bytes:
        return cast(bytes, cast(Any, self._client).execute_command("CLIENT", *words))

    def close(self) -> None:
        if self._client is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                self._client.close()  # gives the connection back to its pool
                self._client.connection_pool.disconnect()
        self._client = None


def keyspaces(block: Redis, run: str) -> list[Keyspace]:
    """The server that `[redis]` names, and every other one of the same data set that answers: those that its Sentinels
    know, its own replicas, its master. A failover or a restore changes all of them."""
    token = secrets.token_hex(6)
    return [Keyspace(block.at(address), run, token) for address in (block.address, *found_servers(block))]


def _word(text: str) -> str:
    """Names of connections have no spaces."""
    return "".join(one if one.isascii() and one.isalnum() else "-" for one in text)


def _names(listed: bytes) -> list[bytes]:
    lines = (line.split() for line in listed.splitlines())
    return [word.removeprefix(b"name=") for words in lines for word in words if word.startswith(b"name=")]


class Directory:
    """A directory of this host: by its place, so that a missing one is locked too, and by device and inode, so that one
    that is mounted in two places is. Where a run swaps it, the one that has its name by then is locked as well. `flock`
    names nobody: the run's name is that of an anonymous file, which others find among the files that the locking
    process has open. `by_place`: False for a directory that only runs make and delete."""

    def __init__(self, path: str, run: str, *, by_place: bool = True) -> None:
        self.path = Path(path)
        self._by_place = by_place
        self.name = path
        self.run = run
        self._open: dict[tuple[int, int], int] = {}
        self._named: list[int] = []
        self._places = set[Path]()

    @property
    def held(self) -> bool:
        try:
            found = self.path.stat()
        except OSError:
            return bool(self._open)  # renamed or deleted: by this run
        return (found.st_dev, found.st_ino) in self._open

    def identity(self) -> str:
        try:
            found = self.path.stat()
        except OSError:
            return ""
        return f"directory {found.st_dev} {found.st_ino}"

    def take(self) -> bool:
        place = self._by_place and self._take(self._open_place)
        return self._take(self._open_itself) or place

    def _open_itself(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _open_place(self) -> int:
        """The file that stands for it, in the nearest directory above it. Only that one's owner can open the file."""
        path = Path(os.path.realpath(self.path))
        above = next(one for one in path.parents if one.is_dir())
        name = f".{'-'.join(path.relative_to(above).parts)}.interview-ops-lock"
        self._places.add(above / name)
        directory, flags = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=directory)
            owner = os.fstat(directory)
            with contextlib.suppress(OSError):  # only root can give it away
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            return descriptor
        except FileExistsError:  # not given to anybody: it may be a link to another file
            return os.open(name, os.O_RDWR | flags, dir_fd=directory)
        finally:
            os.close(directory)

    def _take(self, opened: Callable[[], int]) -> bool:
        """Lock what `opened` opens, unless this run has; False where it cannot be locked from here.

        Raises:
            Locked: another run has.
        """
        try:
            descriptor = opened()
        except OSError:
            return False
        found = os.fstat(descriptor)
        key = found.st_dev, found.st_ino
        if key in self._open:
            os.close(descriptor)
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            self.close()
            raise _locked(self.name, _who_locks(found.st_ino)) from None
        except OSError:  # a network file system that cannot
            os.close(descriptor)
            return False
        if not os.fstat(descriptor).st_nlink:  # the run that had it deleted it meanwhile
            os.close(descriptor)
            return self._take(opened)
        self._open[key] = descriptor
        with contextlib.suppress(OSError):
            self._named.append(os.memfd_create(f"{PREFIX}{found.st_ino}:{self.run[:150]}"))
        return True

    def close(self) -> None:
        for place in self._places:
            with contextlib.suppress(OSError):
                found = place.lstat()
                if (found.st_dev, found.st_ino) in self._open:
                    place.unlink()
        for descriptor in (*self._open.values(), *self._named):
            os.close(descriptor)
        self._open, self._named, self._places = {}, [], set()


def _who_locks(inode: int) -> str:
    """The run that has locked a directory, for people; source: proc_locks(5). Without rights to look at its files, its
    process; in a container not even that."""
    pids = []
    with contextlib.suppress(OSError):
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pids = [row[4] for row in rows if row[1] == "FLOCK" and row[5].rpartition(":")[2] == str(inode)]
    mark = f"/memfd:{PREFIX}{inode}:"
    for pid in pids:
        with contextlib.suppress(OSError):
            names = [str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink()]
            if found := next((name for name in names if name.startswith(mark)), ""):
                return f"“{found.removeprefix(mark).removesuffix(' (deleted)')}”, process {pid}"
    return f"process {pids[0]} of this host" if pids and pids[0] != "0" else "another run of this host"


def _locked(what: str, who: str) -> Locked:
    return Locked(
        f"{what} is being changed by {who}",
        "wait for that run to end; if it belongs to another environment, two environments describe the same "
        "system: run python -m deployments.doctor",
    )


def _take(part: LockedPart) -> bool:
    """A session that has just been closed keeps its lock for some milliseconds more."""
    refused: list[Locked] = []

    def once() -> tuple[bool] | None:
        try:
            return (part.take(),)
        except Locked as error:
            refused.append(error)
            return None

    try:
        taken = until(once, what=part.name, seconds=ENDING_SECONDS)
    except Unreachable:
        raise refused[-1] from None
    return bool(taken and taken[0])


class Exclusion:
    """All that one run may change. What cannot be locked from here (remote and down, no rights) is left out until it
    can."""

    def __init__(self, parts: Sequence[LockedPart]) -> None:
        self._parts = parts
        self._taken: list[LockedPart] = []
        self._asked = 0.0
        self._checking = threading.Lock()  # steps that run beside each other

    def identities(self) -> dict[str, str]:
        """Of all that can be reached: identity → name for people."""
        found = {part.identity(): part.name for part in self._parts}
        return {identity: name for identity, name in found.items() if identity}

    def take(self) -> str:
        """Lock everything that can be; returns what is locked, for people.

        Raises:
            Locked: another run holds a part; nothing is locked then.
            OpsError: a part cannot be locked, ever; nothing is locked then.
        """
        try:
            self._taken = [part for part in self._parts if _take(part)]
        except OpsError:
            self.close()
            raise
        self._asked = time.monotonic()
        return ", ".join(part.name for part in self._taken)

    def require(self) -> None:
        """Take again what was lost: this run, or a failure, restarted the server. Take what could not be locked before:
        it may answer by now. One that does not answer holds nobody's lock.

        Raises:
            LockLost: another run took it since.
        """
        with self._checking:
            again = time.monotonic() - self._asked > AGAIN_SECONDS
            parts = [part for part in (self._parts if again else self._taken) if not part.held]
            for part in parts:
                try:
                    if _take(part) and part not in self._taken:
                        self._taken.append(part)
                except Locked as error:
                    raise LockLost(error.message, error.hint) from None
            self._asked = time.monotonic() if again else self._asked

    def close(self) -> None:
        """Free everything."""
        for part in self._parts:
            part.close()
