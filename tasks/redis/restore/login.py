"""This user's rights on the server after its next start, checked before anything stops.

A start loses users and rights that were set at run time, unless ACL SAVE or CONFIG REWRITE saved them. A scratch server
without data gets the users of the configuration's files. https://valkey.io/topics/acl/
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.files import inside
from tasks.redis.line import socket_of
from tasks.redis.restore.place import Precondition
from tasks.redis.server import at_once, call, live_directory
from tasks.redis.settings.file import Configuration, read_configuration
from tasks.redis.settings.next_start import started

Commands = Sequence[Sequence[str]]
VERIFYING: Commands = (("INFO",), ("COMMAND", "LIST"), ("CLIENT", "SETNAME", "x"))
"""The commands of start_redis and verify_live_redis."""
LEADING: Commands = (("REPLICAOF", "NO", "ONE"),)
WATCHING: Commands = (
    *(("PING",), ("MULTI",), ("EXEC",), ("SLAVEOF", "NO", "ONE"), ("CONFIG", "REWRITE"), ("SUBSCRIBE", "x")),
    *(("PUBLISH", "x", "x"), ("CLIENT", "KILL", "TYPE", "normal"), ("SCRIPT", "KILL")),
)
"""The commands of a Sentinel, which logs in as the same user (https://valkey.io/topics/sentinel/)."""
JUDGE = f"ops-{secrets.token_hex(4)}"
"""A user of scratch servers that this process starts."""
_RULES = re.compile(r"\s*(?:user|requirepass|acl-pubsub-default)\s", re.IGNORECASE)


def judge_login(block: Redis, *, is_watched: bool, is_alone: bool) -> Iterator[Precondition]:
    """Whether this user can log in after the start, and may run the commands that verify the data and attach replicas
    (unless it is alone) and Sentinels (`is_watched`)."""
    name, user = "rights after the start", block.username or "default"
    try:
        configuration = read_configuration(Path(block.config_file))
        rules = rules_of(block, configuration)
    except OpsError:
        return  # an unreadable configuration or a missing ACL file is reported elsewhere
    wanted = (*VERIFYING, *(() if is_alone else LEADING), *(WATCHING if is_watched else ()))
    try:
        refused = _refused(block, rules, user, wanted)
    except OpsError as error:
        hint = f"correct the users in {block.config_file} or its ACL file: the server would not start with them"
        modules = any(line.lower().startswith("loadmodule") for line in configuration.lines)
        yield Precondition(name, False, hint, f"unknown: {error.message}", blocks=not modules)
        return
    except redis.RedisError as error:
        yield Precondition(name, False, "check them by hand", f"unknown: {error}", blocks=False)
        return
    if refused is None:
        hint = "save the user with ACL SAVE or CONFIG REWRITE, or correct the secret and register the blocks again"
        yield Precondition(name, False, hint, f"the configuration has no user {user} with this password")
        return
    rules_told = " ".join(f"+{command}" for command in refused)
    hint = f"ACL SETUSER {user} {rules_told}, then ACL SAVE or CONFIG REWRITE"
    yield Precondition(name, not refused, hint, f"{user} may not: {', '.join(refused).upper()}" if refused else "all")


def rules_of(block: Redis, configuration: Configuration) -> list[str]:
    """The lines that define users, as the server reads them; the ACL file's come last.

    Raises:
        OpsError: the ACL file cannot be read.
    """
    lines = [line for line in configuration.lines if _RULES.match(line)]
    if acl := configuration.get("aclfile"):
        path = live_directory(block) / acl
        try:
            lines += [line for line in inside.read_text(path, "surrogateescape").splitlines() if _RULES.match(line)]
        except OSError as error:
            raise OpsError(f"{path} cannot be read: {error.strerror}") from None
    return lines


def _refused(block: Redis, rules: Sequence[str], user: str, wanted: Commands) -> list[str] | None:
    """The commands that the user may not run, as ACL rules name them; None: it cannot log in.

    Raises:
        OpsError: the server does not start with those users.
        redis.RedisError: the server does not report it.
    """
    with with_users(block, rules) as (client, asking):
        if not _logs_in(client, user, block.password.get_secret_value()):
            return None
        answers = [call(asking, "ACL", "DRYRUN", user, *words) for words in wanted]
    return [named for answer in answers if (named := _named(answer))]


@contextlib.contextmanager
def with_users(block: Redis, rules: Sequence[str]) -> Iterator[tuple[redis.Redis, redis.Redis]]:
    """A scratch server with those users: a client without a login, and one that may do everything as the user JUDGE.

    Raises:
        OpsError: the server does not start with those users.
    """
    word = secrets.token_hex(16)
    with (
        started(block, "\n".join((*rules, f"user {JUDGE} on >{word} ~* &* +@all"))) as client,
        contextlib.closing(_client_as(client, JUDGE, word)) as asking,
    ):
        yield client, asking


def _client_as(client: redis.Redis, user: str, password: str) -> redis.Redis:
    """Another client of the same scratch server."""
    return at_once(
        redis.Redis(unix_socket_path=str(socket_of(client)), username=user, password=password, socket_timeout=300)
    )


def _logs_in(client: redis.Redis, user: str, password: str) -> bool:
    with contextlib.closing(_client_as(client, user, password)) as other:
        try:
            other.ping()
        except redis.AuthenticationError:
            return False
        except redis.ResponseError:  # it may not PING, which is reported by name
            return True
    return True


def _named(answer: Any) -> str:
    """The command that ACL DRYRUN refuses, "": none; a channel is returned unchanged."""
    said = answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
    if said == "OK":
        return ""
    found = re.search(r"run the '([^']+)' command", said)
    return found[1] if found else "@pubsub &*" if "channel" in said else said
