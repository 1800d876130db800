"""Changes of Redis settings: CONFIG SET, switching the AOF on, CONFIG REWRITE (§2.3, §2.4).

https://valkey.io/commands/config-set/ and https://valkey.io/commands/config-rewrite/
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.redis.persistence.place import inspect_place
from tasks.redis.persistence.saving import Saved, carry_out
from tasks.redis.persistence.state import PersistenceState
from tasks.redis.server import connected, key_counts
from tasks.redis.settings.recommended import shown
from tasks.redis.settings.running import RedisServerSettings

SET, REWRITE = "config set", "config rewrite"
# The server tries limits of open files in steps of 16, and serves no client meanwhile: for 1,000,000 it took 0.2 s.
STEP_CLIENTS = 16_000
# The open files that the server reserves for itself (CONFIG_MIN_RESERVED_FDS).
RESERVED_FILES = 32


@dataclass(frozen=True)
class RedisSettingChange:
    """A value for CONFIG SET. `old`: the value that an undo restores; `ended`: the overrides that it ends."""

    name: str
    value: str
    old: str = field(default="", compare=False)
    ended: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.name} {shown(self.name, self.value)}" if self.value else f'{self.name} ""'


ON, OFF = RedisSettingChange("appendonly", "yes"), RedisSettingChange("appendonly", "no")


@dataclass(frozen=True)
class SettingsChanged:
    """The result of a change: set, or why the server refused it."""

    change: RedisSettingChange
    refused: str = ""


def _act_of(found: RedisServerSettings, change: RedisSettingChange) -> Act:
    return Act(SET, f"{change} on {found.address}")


@action(of=lambda found, changes: [_act_of(found, change) for change in changes], idempotent=True)
def set_values(
    block: Redis, found: RedisServerSettings, changes: Sequence[RedisSettingChange]
) -> tuple[SettingsChanged, ...]:
    """CONFIG SET, one after the other; before each, the server's run and role are checked.

    Raises:
        OpsError: the server was restarted, or changed its role. Values set before stay.
        Unreachable: the connection broke.
    """
    try:
        with connected(block) as client:
            done = []
            for change in changes:
                require_same(client, found)
                done.append(_set(client, found, change))
                failpoint("redis settings: set")
            return tuple(done)
    except Unreachable as error:
        raise Unreachable(f"while settings were set: {error.message}", "start it, then run this again") from None


def _set(client: redis.Redis, found: RedisServerSettings, change: RedisSettingChange) -> SettingsChanged:
    try:
        for value in _steps(found, change):
            client.config_set(change.name, value)
    except redis.exceptions.NoPermissionError:
        raise
    except redis.ResponseError as error:
        if change.name == "maxclients":
            client.config_set("maxclients", found.running["maxclients"])
        return SettingsChanged(change, re.sub(r"^CONFIG SET failed.*? - ", "", str(error)))
    return SettingsChanged(change)


def _steps(found: RedisServerSettings, change: RedisSettingChange) -> list[str]:
    """Raise maxclients in steps, so that a refusal comes before the server has tried for long."""
    if change.name != "maxclients":
        return [change.value]
    return [
        *map(str, range(int(found.running["maxclients"]) + STEP_CLIENTS, int(change.value), STEP_CLIENTS)),
        change.value,
    ]


def require_same(client: redis.Redis, found: RedisServerSettings) -> None:
    """Raises OpsError if the server was restarted, promoted or demoted since it was read."""
    run_id, role = str(client.info("server")["run_id"]), str(client.info("replication")["role"])
    if run_id != found.server.state.run_id:
        hint = "run it again: values that were not yet in its file are lost; the record has the old values"
        raise OpsError(f"Redis at {found.address} was restarted meanwhile", hint)
    if role != found.role:
        hint = "run it again: it finds the new master; the values set here stay, the record has the old values"
        raise OpsError(f"Redis at {found.address} is now a {role}; it was a {found.role}", hint)


@action(of=lambda found: _act_of(found, ON))
def switch_aof_on(block: Redis, found: RedisServerSettings) -> Saved:
    """CONFIG SET appendonly yes, and wait until the AOF is complete, before the file is written. After a failure it is
    switched off again, because the server would retry without end.

    Raises:
        OpsError: the rewrite failed (with the reason from INFO and the disk).
        VerificationFailed: the number of keys changed, but no client wrote.
    """
    with connected(block) as client:
        require_same(client, found)
        before = _content(client)
    what = "CONFIG SET appendonly yes"
    try:
        saved = carry_out(block, found.server, what, lambda c: c.config_set("appendonly", "yes"), _is_on, _has_failed)
    except OpsError as error:
        raise OpsError(f"{error.message}; {_switched_off(block)}", error.hint) from None
    with connected(block) as client:
        after = _content(client)
    if before[0] != after[0] and before[1:] == after[1:]:
        raise VerificationFailed(
            f"{after[0]:,} keys after the AOF was switched on, {before[0]:,} before, and no client wrote",
            "check the server's log before a restart",
        )
    missing = inspect_place(found.server).missing
    if missing:
        raise VerificationFailed(f"files of the new AOF are missing: {missing[0].name}", "snapshot-redis, kind=rewrite")
    return saved


def _is_on(before: PersistenceState, now: PersistenceState) -> bool:
    return now.aof_enabled and now.rewrites > before.rewrites and now.rewrite_ok and not now.rewriting


def _has_failed(before: PersistenceState, now: PersistenceState) -> bool:
    """A rewrite that was started now has failed; the server schedules the next one automatically."""
    if now.rewrite_ok or now.rewrites == before.rewrites:
        return not now.rewriting and not now.saving
    return before.rewrite_ok or now.rewrites > before.rewrites + 1 or not now.rewriting


def _switched_off(block: Redis) -> str:
    try:
        with connected(block) as client:
            client.config_set("appendonly", "no")
    except OpsError as error:
        return f"and it could not be switched off again: {error.message}"
    return "the AOF is off again"


def _content(client: redis.Redis) -> tuple[int, int, int, int]:
    """The number of keys, and the counters of changes: writes, expiry, eviction."""
    info: dict[str, Any] = client.info()
    keys = sum(keys for keys, _ in key_counts(client).values())
    changes = int(info["rdb_changes_since_last_save"]) + int(info["rdb_saves"])
    return keys, changes, int(info["expired_keys"]), int(info["evicted_keys"])


@action(of=lambda found: Act(REWRITE, found.address), idempotent=True)
def rewrite_file(block: Redis, found: RedisServerSettings) -> str:
    """CONFIG REWRITE; returns why the server could not write its file, "": it did.

    Raises:
        OpsError: the server was restarted, or changed its role.
    """
    with connected(block) as client:
        require_same(client, found)
        try:
            client.config_rewrite()
        except redis.exceptions.NoPermissionError:
            raise
        except redis.ResponseError as error:
            return str(error)
    return ""
