"""A server's persistence: settings, the last save and rewrite, failures, the cost of a fork (§2.3).

https://valkey.io/topics/persistence/ and https://valkey.io/commands/info/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.redis.server import connected, key_counts, version_of
from tasks.redis.settings.recommended import DEFAULTS, SettingRule, parse_rules

_SECTIONS = ("default", "commandstats")


@dataclass(frozen=True)
class PersistenceState:
    """The counters from one INFO. `*_seconds` -1: none yet. `last_save`: whole seconds of the server's clock; its
    start, if it has not saved. `flushes`: FLUSHALLs."""

    run_id: str
    role: str
    master: str
    loading: bool
    saving: bool
    rewriting: bool
    save_ok: bool
    rewrite_ok: bool
    write_ok: bool
    saves: int
    rewrites: int
    last_save: int
    save_seconds: int
    rewrite_seconds: int
    save_cow_bytes: int
    rewrite_cow_bytes: int
    changes: int
    flushes: int
    aof_enabled: bool
    aof_bytes: int
    aof_base_bytes: int
    delayed_fsyncs: int
    fork_seconds: float
    done_keys: int
    all_keys: int
    loaded_keys: int


@dataclass(frozen=True)
class Persistence:
    """One server. `process`: its process id. `config_file` "": it was started without one. The setting `dir` "": that
    directory was deleted."""

    address: str
    version: str
    process: int
    uptime_seconds: float
    config_file: str
    now: datetime
    keys: int
    dataset_bytes: int
    used_bytes: int
    system_bytes: int
    replicas: int
    settings: Mapping[str, str]
    state: PersistenceState

    @property
    def rules(self) -> tuple[SettingRule, ...]:
        """The rules for automatic saves."""
        return parse_rules(self.settings["save"])

    @property
    def appendonly(self) -> bool:
        """Whether it writes an AOF now."""
        return self.state.aof_enabled

    @property
    def since_save_seconds(self) -> float:
        """Seconds since the last save, or since its start if it has not saved."""
        return max(0.0, self.now.timestamp() - self.state.last_save)

    @property
    def never_saved(self) -> bool:
        """No save has succeeded since its start; `last_save` is then the start. `saves` counts started ones, and whole
        seconds cannot distinguish the start from a save immediately after it."""
        failed = not self.state.save_ok and self.uptime_seconds - self.since_save_seconds < 1.5
        return failed or not self.state.saves

    @property
    def is_fresh(self) -> bool:
        """It started without data and has not saved yet, so a missing RDB is normal."""
        return self.never_saved and not self.state.loaded_keys

    @property
    def refuses_writes(self) -> str:
        """Why writes now get MISCONF; "": they do not (a replica never refuses them so)."""
        state = self.state
        if state.role != "master":
            return ""
        stops = self.settings["stop-writes-on-bgsave-error"] == "yes"
        if stops and self.rules and not state.save_ok:
            return "the last save failed, and stop-writes-on-bgsave-error is on"
        return "" if state.write_ok or not self.appendonly else "its AOF cannot be written"


@probe
def read_persistence(block: Redis) -> Persistence:
    """Settings and counters of one server, by four cheap commands.

    Raises:
        Unreachable: the server is down or still loading.
        OpsError: it refuses the password or a command.
    """
    return ask(block)


def ask(block: Redis) -> Persistence:
    """See `read_persistence`."""
    with connected(block) as client:
        info: dict[str, Any] = client.info(*_SECTIONS)
        seconds, microseconds = client.time()
        settings = {str(name): str(value) for name, value in client.config_get(*DEFAULTS).items()}
        if missing := [name for name in DEFAULTS if name not in settings]:
            raise OpsError(f"{block.address} does not know {', '.join(missing)}", "Redis 7 or Valkey is needed")
        return Persistence(
            address=block.address,
            version=version_of(client),
            process=int(info["process_id"]),
            uptime_seconds=float(info["uptime_in_seconds"]),
            config_file=str(info.get("config_file", "")),
            now=datetime.fromtimestamp(seconds + microseconds / 1e6, UTC),
            keys=sum(keys for keys, _ in key_counts(client).values()),
            dataset_bytes=int(info["used_memory_dataset"]),
            used_bytes=int(info["used_memory"]),
            system_bytes=int(info.get("total_system_memory", 0)),
            replicas=int(info.get("connected_slaves", 0)),
            settings=settings,
            state=state_of(info),
        )


def read_state(client: redis.Redis) -> PersistenceState:
    """The counters now."""
    return state_of(client.info(*_SECTIONS))


def state_of(info: Mapping[str, Any]) -> PersistenceState:
    """The counters in an INFO with its default sections and commandstats (without the latter, no FLUSHALL is
    counted)."""
    follows = f"{info.get('master_host')}:{info.get('master_port')}" if "master_host" in info else ""
    return PersistenceState(
        run_id=str(info["run_id"]),
        role=str(info["role"]),
        master=follows,
        loading=bool(info["loading"]),
        saving=bool(info["rdb_bgsave_in_progress"]),
        rewriting=bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]),
        save_ok=info["rdb_last_bgsave_status"] == "ok",
        rewrite_ok=info["aof_last_bgrewrite_status"] == "ok",
        write_ok=info["aof_last_write_status"] == "ok",
        saves=int(info["rdb_saves"]),
        rewrites=int(info["aof_rewrites"]),
        last_save=int(info["rdb_last_save_time"]),
        save_seconds=int(info["rdb_last_bgsave_time_sec"]),
        rewrite_seconds=int(info["aof_last_rewrite_time_sec"]),
        save_cow_bytes=int(info["rdb_last_cow_size"]),
        rewrite_cow_bytes=int(info["aof_last_cow_size"]),
        changes=int(info["rdb_changes_since_last_save"]),
        flushes=int(info.get("cmdstat_flushall", {}).get("calls", 0)),
        aof_enabled=bool(info["aof_enabled"]),
        aof_bytes=int(info.get("aof_current_size", 0)),
        aof_base_bytes=int(info.get("aof_base_size", 0)),
        delayed_fsyncs=int(info.get("aof_delayed_fsync", 0)),
        fork_seconds=int(info["latest_fork_usec"]) / 1e6,
        done_keys=int(info.get("current_save_keys_processed", 0)),
        all_keys=int(info.get("current_save_keys_total", 0)),
        loaded_keys=int(info.get("rdb_last_load_keys_loaded", 0)),
    )
