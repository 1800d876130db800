"""Scripts in the server, one call a page, and the size of such a page (https://valkey.io/commands/eval/)."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any

import redis

from tasks.redis.server import call


def evaluate(client: redis.Redis, script: str, *words: object, command: str = "", read_only: bool = False) -> Any:
    """A script's answer. It is called by its hash, so that its text is sent once.

    `command`: what a server may lack that the script calls. `read_only`: EVAL_RO, for users who may not EVAL.
    """
    suffix = "_RO" if read_only else ""
    try:
        try:
            return call(client, f"EVALSHA{suffix}", _sha(script), 0, *words)
        except redis.exceptions.NoScriptError:
            return call(client, f"EVAL{suffix}", script, 0, *words)
    except redis.ResponseError as error:
        raise as_command(error, command) from None


def as_command(error: redis.ResponseError, command: str) -> redis.ResponseError:
    """A refusal inside a script, as the server words it for that `command` outside a script."""
    if str(error).startswith("ACL failure"):
        return redis.exceptions.NoPermissionError(str(error))
    if re.match(r"Unknown (Redis )?command called from script", str(error)):
        return redis.ResponseError(f"unknown command '{command}'")
    return error


@functools.cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


class PageSize:
    """How many keys the next page may have, so that the server works on it for about `seconds`."""

    def __init__(self, seconds: float, *, least: int, most: int) -> None:
        self.keys = least
        self._seconds, self._least, self._most = seconds, least, most

    def adapt(self, worked_seconds: float) -> None:
        """The last page took so long: the next has at most twice, at least a quarter of its keys."""
        wanted = round(self.keys * self._seconds / max(worked_seconds, self._seconds / 2))
        self.keys = min(max(wanted, self.keys // 4, self._least), self._most)
