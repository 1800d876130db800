"""The ACL users of a Redis server, without their passwords.

https://valkey.io/commands/acl-getuser/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.server import call, connected
from tasks.redis.settings.next_start import settings_of

SECRET = ("requirepass", "masterauth", "tls-key-file-pass", "tls-client-key-file-pass")


@dataclass(frozen=True)
class AclUser:
    """One ACL user. `passwords`: how many; `open`: it needs no password."""

    name: str
    flags: tuple[str, ...]
    passwords: int
    commands: str
    keys: str
    channels: str

    @property
    def open(self) -> bool:
        """Whether it needs no password."""
        return "on" in self.flags and "nopass" in self.flags


@dataclass(frozen=True)
class RedisAccess:
    """A server's users, and its settings without secrets."""

    users: tuple[AclUser, ...]
    settings: dict[str, str]


@probe
def read_access(block: Redis) -> RedisAccess:
    """Every ACL user and every setting.

    Raises:
        Unreachable: the server does not answer.
        OpsError: this user may not run the commands.
    """
    with connected(block) as client:
        users = tuple(_user(client, _text(name)) for name in call(client, "ACL", "USERS"))
        settings = settings_of(client)
        return RedisAccess(users, {name: value for name, value in sorted(settings.items()) if name not in SECRET})


def _user(client: redis.Redis, name: str) -> AclUser:
    found: dict[str, Any] = client.acl_getuser(name) or {}
    flags = tuple(_text(flag) for flag in found.get("flags", ()))
    commands, keys, channels = (_rule(found.get(of)) for of in ("commands", "keys", "channels"))
    return AclUser(name, flags, len(found.get("passwords", ())), commands, keys, channels)


def _rule(value: Any) -> str:
    return " ".join(map(_text, value)) if isinstance(value, list | tuple | set) else _text(value or "")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
