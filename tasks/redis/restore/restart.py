"""Settings and users that only run: a restore starts the server anew, with those of its files (§2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from tasks.redis.restore.login import JUDGE, rules_of, with_users
from tasks.redis.restore.place import Precondition
from tasks.redis.server import call, connected
from tasks.redis.settings.file import read_configuration
from tasks.redis.settings.running import differences, query_settings

SAVE_USERS = "save them before, or set them again afterwards: ACL SAVE (with an aclfile) or CONFIG REWRITE"


def judge_restart(block: Redis) -> Iterator[Precondition]:
    """The running settings and users that the start replaces, with the values of the files. A running server only."""
    name, expected = "settings after the start", "the running ones"
    try:
        found = query_settings(block)
    except OpsError as error:
        yield Precondition(
            name, False, "compare them by hand", f"not measured: {error.message}", expected, blocks=False
        )
        return
    problem = found.problem or found.others_problem
    lost = "; ".join([*differences(found.unwritten()), *([f"not measured: {problem}"] if problem else [])])
    hint = "save them before (CONFIG REWRITE, or apply-redis-settings), or set them again: the written ones apply then"
    yield Precondition(name, not lost, hint, lost or found.server.config_file, expected, blocks=False)
    yield from _judge_users(block)


def _judge_users(block: Redis) -> Iterator[Precondition]:
    name, expected = "users after the start", "the running ones"
    try:
        with connected(block) as client:
            now = _users(client)
        with with_users(block, rules_of(block, read_configuration(Path(block.config_file)))) as (_, asking):
            then = _users(asking)
    except (OpsError, redis.RedisError) as error:
        why = f"not measured: {getattr(error, 'message', error)}"
        yield Precondition(name, False, SAVE_USERS, why, expected, blocks=False)
        return
    then.pop(JUDGE)
    changes = [f"{user} is missing then" for user in now.keys() - then.keys()]
    changes += [f"{user} exists again then" for user in then.keys() - now.keys()]
    changes += [f"{user} has the file's rules then" for user in now.keys() & then.keys() if now[user] != then[user]]
    yield Precondition(
        name, not changes, SAVE_USERS, "; ".join(sorted(changes)) or f"{len(now)}", expected, blocks=False
    )


def _users(client: redis.Redis) -> dict[str, str]:
    """Each user's rules, with the hashes of its passwords: they are compared, and never shown."""
    lines = [line.decode(errors="replace") for line in call(client, "ACL", "LIST")]
    return {line.split()[1]: line for line in lines}
