"""Why a setting of Redis cannot, or must not, be changed now, and what to do (§2.3, §2.4)."""

from __future__ import annotations

from flows.redis.setting_findings import remedy
from runbook.render import size
from tasks.redis.persistence.place import look_at
from tasks.redis.settings.changes import ON, RESERVED_FILES, Change
from tasks.redis.settings.recommended import KINDS, MAXMEMORY, normal, shown
from tasks.redis.settings.running import AT_ONCE, ServerSettings


def obstacle_to(found: ServerSettings, change: Change) -> tuple[str, str] | None:
    """Why a value cannot, or must not, be set now; and what to do."""
    name, value = change.name, change.value
    how, runs = found.by.get(name, ""), f"{shown(name, found.running[name])} runs"
    if name == "dir":
        return runs, remedy(found, name)
    if KINDS[name] == "name":
        return runs, (
            "leave it: a start under another name finds no data and serves 0 keys. To rename: stop it, rename the "
            f"file too, change {name} in {found.server.config_file or 'its configuration file'}, start it"
        )
    if how not in ("", AT_ONCE):
        return f"{runs}; takes effect by {how}", remedy(found, name)
    if name == "maxclients":
        return _too_many_or_few(found, int(value))
    if name == MAXMEMORY:
        return _too_much_or_little(found, int(normal(name, value)))
    return _no_place_for_aof(found) if change == ON else None


def _too_many_or_few(found: ServerSettings, value: int) -> tuple[str, str] | None:
    if value < found.connections + 1:
        hint = f"close some first (check-redis-clients): {found.connections} are connected, new ones would be refused"
        return f"{value} is below what is connected", hint
    if 0 < found.most_files < value + RESERVED_FILES:
        most = found.most_files - RESERVED_FILES
        return f"its process may open {found.most_files} files: {most} clients at most", (
            f"raise LimitNOFILE in its unit (ulimit -n) to {value + RESERVED_FILES} or more and restart it; the server "
            "would refuse it, after it has served nobody for a while"
        )
    return None


def _too_much_or_little(found: ServerSettings, value: int) -> tuple[str, str] | None:
    used, host = found.server.used_bytes, found.server.system_bytes
    if 0 < value < used:
        return f"{size(used)} are in use", (
            "free memory first (check-redis-memory, clear-cache): below what is used it evicts keys, or refuses every "
            "write, at once"
        )
    if host and value > host:
        return f"its host has {size(host)}", "choose less: the kernel would end it before it reaches that"
    return None


def _no_place_for_aof(found: ServerSettings) -> tuple[str, str] | None:
    place, needed = look_at(found.server), found.server.dataset_bytes
    if place.trouble:
        return place.trouble, place.remedy
    if not place.problem and place.free_bytes <= needed:
        return f"{size(place.free_bytes)} are free", f"make room at {place.directory}: the AOF needs {size(needed)}"
    return None
