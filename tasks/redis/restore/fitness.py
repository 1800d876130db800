"""The conditions for replacing a server's data: the backup, the disk space, and the other servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from blocks.redis.server import Redis
from runbook.errors import OTHER_BACKUPS, OpsError, Unreachable, VerificationFailed
from runbook.kinds import probe
from runbook.units import size
from tasks.backups.catalogue import Backup
from tasks.redis.backup.snapshot import RDB
from tasks.redis.content.manifest import RedisContent
from tasks.redis.restore.login import judge_login
from tasks.redis.restore.place import Precondition, judge_place
from tasks.redis.restore.restart import judge_restart
from tasks.redis.scratch import refuse_empty, scratch_server
from tasks.redis.server import connected, family, key_counts, live_directory, loaded_keys, program_version, version_of
from tasks.redis.settings.file import Configuration, read_configuration
from tasks.redis.topology.topology import ReplicationTopology

# The RDB as the AOF's base, the RDB saved after drop_prefixes were deleted, and the log of that.
COPIES = 2.2


@dataclass(frozen=True)
class RedisFitness:
    """The conditions for replacing a server's data. `live_keys`: its current keys, None: it is down."""

    preconditions: tuple[Precondition, ...]
    live_keys: dict[int, int] | None
    copy_bytes: int
    load_seconds: float
    around: ReplicationTopology

    @property
    def problems(self) -> tuple[str, ...]:
        """The conditions that prevent the restore, as sentences with the next step."""
        return tuple(f"{p.name}: {p.value} — {p.hint}" for p in self.preconditions if p.blocks and not p.ok)


@probe
def judge_redis_backup(block: Redis, backup: Backup, around: ReplicationTopology) -> RedisFitness:
    """All conditions that can be checked without stopping or changing anything. A scratch server loads the RDB, because
    only that proves that the server can read it. Problems are returned, not raised.
    """
    content = RedisContent.model_validate(backup.manifest.content)
    copy_bytes = int((backup.path / RDB).stat().st_size * COPIES) if (backup.path / RDB).exists() else 0
    program = _program(block)
    loads, seconds = _loads(block, backup, content, program.value) if program.ok else (None, 0.0)
    found = [program, *([loads] if loads else [])]
    return _judge(block, content, around, found, copy_bytes, seconds)


@probe
def judge_redis_copy(block: Redis, content: RedisContent, around: ReplicationTopology) -> RedisFitness:
    """The same for data that another server or this one's files have: it is loaded and proven after its capture, before
    anything is replaced."""
    program = _program(block)
    known, version = content.server_version, program.value
    same = Precondition(
        "version of the surviving copy",
        not program.ok or known == version,
        f"set [redis] server_program to {known}: the captured data is proven before anything is replaced",
        known,
        version,
        blocks=family(known) != family(version),
    )
    return _judge(block, content, around, [program, same], content.memory_bytes, 0.0)


def _judge(
    block: Redis,
    content: RedisContent,
    around: ReplicationTopology,
    found: list[Precondition],
    copy_bytes: int,
    seconds: float,
) -> RedisFitness:
    program = found[0]
    found += judge_place(block, copy_bytes, writes_configuration=not around.is_alone)
    found += _memory(content)
    found += _configuration(block, content, around)
    found += judge_login(block, is_watched=bool(around.watchers), is_alone=around.is_alone) if program.ok else ()
    live, keys = _live(block, program.value)
    found += live
    if keys is not None:
        found += judge_restart(block)
    found += _around(around)
    return RedisFitness(tuple(found), keys, copy_bytes, seconds, around)


def _program(block: Redis) -> Precondition:
    try:
        return Precondition("server program", True, value=program_version(block))
    except OpsError as error:
        return Precondition("server program", False, error.hint or "correct [redis] server_program", error.message)


def _loads(block: Redis, backup: Backup, content: RedisContent, program: str) -> tuple[Precondition, float]:
    started, taken_by = time.monotonic(), content.server_version
    name, expected = "the backup loads", f"{content.rdb_keys:,} keys of {taken_by}"
    try:
        refuse_empty(backup.path / RDB)
        with scratch_server(block, backup.path, rdb=RDB) as client:
            count = loaded_keys(client)
    except VerificationFailed as error:
        if family(taken_by) != family(program):
            return (
                Precondition(
                    name,
                    False,
                    f"restore it with {family(taken_by)}: the two families cannot read each other's newer RDB files",
                    f"{program} cannot read the RDB of {taken_by}",
                    expected,
                ),
                0.0,
            )
        return Precondition(name, False, error.hint, error.message, expected), 0.0
    except OpsError as error:
        return Precondition(name, False, error.hint, error.message, expected), 0.0
    ok = content.rdb_keys - content.may_vanish <= count <= content.rdb_keys
    return Precondition(name, ok, OTHER_BACKUPS, f"{count:,} keys", expected), time.monotonic() - started


def _memory(content: RedisContent) -> Iterator[Precondition]:
    free = psutil.virtual_memory().available
    yield Precondition(
        "memory for the scratch server",
        free > content.memory_bytes * 1.2,
        "stop other programs: otherwise the kernel kills the scratch server, which ends the restore without damage",
        size(free),
        f"more than {size(content.memory_bytes * 1.2)}",
        blocks=False,
    )


def _configuration(block: Redis, content: RedisContent, around: ReplicationTopology) -> Iterator[Precondition]:
    name = "configuration"
    try:
        found = read_configuration(Path(block.config_file))
    except OpsError as error:
        yield Precondition(name, False, "restore it: backups have a copy without secrets", error.message)
        return
    wrong = _wrong_setting(block, found, around)
    yield Precondition(name, not wrong, wrong[1] if wrong else "", wrong[0] if wrong else str(block.config_file))
    highest, allowed = max(content.databases, default=0), int(found.get("databases", "16"))
    yield Precondition(
        "databases",
        highest < allowed,
        f"set databases {highest + 1} or more in {block.config_file}: otherwise the server cannot load the data",
        f"the backup has database {highest}, and the configuration {allowed} databases",
    )
    limit = found.maxmemory
    yield Precondition(
        "maxmemory",
        not limit or content.memory_bytes <= limit,
        f"raise maxmemory in {block.config_file}; the copy is measured before anything stops",
        f"{size(limit)}, the backup needs {size(content.memory_bytes)}" if limit else "no limit",
        "memory for the restored data",
        blocks=False,
    )
    password = found.get("requirepass") if block.username in ("", "default") else ""
    if password and password != block.password.get_secret_value():
        yield Precondition(
            "password",
            False,
            "correct the secret and register the blocks again: the restored server could not be verified",
            f"not the one of {block.config_file}",
        )


def _wrong_setting(block: Redis, found: Configuration, around: ReplicationTopology) -> tuple[str, str] | None:
    live, configured = live_directory(block), found.get("dir")
    if configured and Path(configured).is_absolute() and Path(configured).resolve() != live:
        return f"{block.config_file} says dir {configured}, the environment {live}", "correct [redis] data_directory"
    if found.get("cluster-enabled", "no").lower() == "yes":
        return "the server is a node of a cluster", "this restore is for a single server"
    if found.replica_of and around.is_alone:
        return f"the server is a replica of {found.replica_of}", "restore its master, or promote this server first"
    acl = Path(found.get("aclfile") or block.config_file)
    if not (live / acl).exists():
        return f"the ACL file {acl} is missing", "create it again (the backup has a copy without secrets)"
    return None


def _live(block: Redis, program: str) -> tuple[list[Precondition], dict[int, int] | None]:
    try:
        with connected(block) as client:
            keys = {number: counts[0] for number, counts in key_counts(client).items()}
            version = version_of(client)
    except Unreachable:
        return [Precondition("the server", True, value="down, which does not prevent a restore")], None
    except OpsError as error:
        return [Precondition("the server", False, error.hint, error.message)], None
    return [
        Precondition(
            "version of the running server",
            version == program,
            "correct [redis] server_program: the copy is proven by another program than the one that serves it",
            version,
            program,
            blocks=family(version) != family(program),
        )
    ], keys


def _around(around: ReplicationTopology) -> Iterator[Precondition]:
    """Replicas and Sentinels that cannot be detached can undo the restore."""
    yield Precondition(
        "Sentinels agree on the master",
        not around.disagreement,
        "wait until the failover ends; SENTINEL RESET on the wrong ones",
        around.disagreement or around.master or "no Sentinel watches it",
    )
    yield Precondition(
        "other servers of the data set",
        not around.dangerous,
        "start it, or stop it for good: otherwise clients' writes to it would be lost",
        f"{', '.join(around.dangerous)} cannot be reached" if around.dangerous else ", ".join(around.others) or "none",
        "each answers, or the Sentinels report it as down",
    )
    if around.unlisted:
        hint = "name all of them in [redis] sentinels; SENTINEL RESET if one is lost for good"
        yield Precondition("Sentinels that are not listed", False, hint, around.unlisted, "none")
    if around.silent:
        yield Precondition(
            "Sentinels that do not answer",
            False,
            "keep them stopped until the restore is verified",
            ", ".join(around.silent),
            "none",
            blocks=False,
        )
