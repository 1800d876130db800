"""What an error of a Redis server, or of the way to it, means: one sentence, and what to do next."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING

import redis

from blocks.redis.wire import mistaken
from runbook.errors import OpsError, Unreachable

if TYPE_CHECKING:
    from blocks.redis.server import Redis

FULL = "max number of clients reached"
TLS_HINT = "correct tls or port in [redis], and register the blocks again"
TLS_FILES = ("tls_ca_file", "tls_certificate_file", "tls_key_file")
# What the server's message begins with → what it means, and what to do.
_STATES = {
    "MISCONF": (
        "takes no writes, because its last save (or its AOF's last write) failed",
        "check-redis-persistence reports the cause; fix it, then run snapshot-redis: a successful save allows writes",
    ),
    "NOREPLICAS": (
        "takes no writes, because fewer replicas are in sync than its min-replicas-to-write asks for",
        "start the replicas that are down, or lower min-replicas-to-write on it",
    ),
}


def meaning(block: Redis, error: redis.RedisError) -> OpsError:
    """Unreachable where it may pass by itself, else a refusal that no retry mends."""
    where, said = f"Redis at {block.address}", str(error)
    if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.AuthorizationError):
        return OpsError(f"{where} refuses the password", "correct the secret and register the blocks again")
    if isinstance(error, redis.exceptions.NoPermissionError):
        return _forbidden(where, said, block.username or "default")
    if isinstance(error, redis.exceptions.ReadOnlyError):
        return OpsError(f"{where} is a replica: it takes no writes", "run it again: the master is found anew")
    if isinstance(error, redis.exceptions.BusyLoadingError):
        return Unreachable(f"{where} is still loading its data", "wait until it has")
    if isinstance(error, redis.exceptions.MasterDownError):
        return Unreachable(f"{where} is a replica without its master and answers nothing", "start the master")
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return OpsError(f"{where} is at its maxmemory: it takes no writes", "run check-redis-memory")
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return _unreachable(block, where, error)
    return _state(where, said)


def _state(where: str, said: str) -> OpsError:
    """What redis-py has no class for."""
    for word, (what, hint) in _STATES.items():
        if said.startswith(word):
            return OpsError(f"{where} {what}", hint)
    if said.startswith("BUSY "):
        hint = "wait until it ends; SCRIPT KILL (FUNCTION KILL) ends one that has written nothing"
        return Unreachable(f"{where} answers nobody while a script runs", hint)
    if unknown := re.search(r"unknown command ['`]([^'`]+)['`]", said, re.IGNORECASE):
        hint = "its configuration renames it (rename-command), or the server is too old for it: give it back"
        return OpsError(f"{where} does not know the command {unknown[1]}", hint)
    return OpsError(f"{where}: {said}")


def _forbidden(where: str, said: str, user: str) -> OpsError:
    """ACL errors name the command, the key or the channel (https://valkey.io/topics/acl/)."""
    named = re.search(r"run the '([^']+)' command", said)
    if named is None:
        said = said.removeprefix("ACL failure in script: ").split(" script:")[0]
        return OpsError(f"{where} forbids user {user} this: {said}", f"give it these keys: ACL SETUSER {user} ~…")
    command = named[1].replace(" ", "|")
    return OpsError(
        f"{where} forbids user {user} the command {command.upper()}",
        f"ACL SETUSER {user} +{command}, and keep it in its ACL file (ACL SAVE)",
    )


def _unreachable(block: Redis, where: str, error: redis.RedisError) -> OpsError:
    if FULL in str(error):
        return Unreachable(
            f"{where} has reached maxclients: it takes no more connections",
            "stop one of the application's workers so that a place is free, then launch close-idle-redis-clients",
        )
    causes = list(_causes(error))
    if any(_is_silent(cause) for cause in causes) and (wrong := mistaken(block.address, tls=block.tls)):
        return OpsError(f"{where} {wrong}", TLS_HINT)
    if block.tls and (problem := _tls(block, where, causes)):
        return problem
    if any(_is_closing(cause) for cause in causes):
        hint = "start it, or check its log. If it runs, it may use TLS on this port ([redis] tls)"
        if block.tls:
            hint = (
                "start it, or check its log. If it runs, it may require a client's certificate, be full (maxclients), "
                "or use no TLS on this port ([redis] tls)"
            )
        return Unreachable(f"{where} does not answer: it closed the connection", hint)
    if isinstance(error, redis.TimeoutError):
        return Unreachable(f"{where} does not answer in time", "it hangs or is unreachable: check its host and its log")
    return Unreachable(f"{where} does not answer", "start it, or check its log")


def _tls(block: Redis, where: str, causes: list[BaseException]) -> OpsError | None:
    """What is wrong with certificates and keys, here or there; None where that is not the reason."""
    for name in TLS_FILES:
        path = getattr(block, name)
        if path and not os.access(path, os.R_OK):
            return OpsError(f"[redis] {name}: {path} cannot be read on this host", "correct the path, or its rights")
    for cause in causes:
        said = str(cause)
        if found := re.search(r"verify failed: ([^(]+)", said):
            reason = found[1].strip()
            return OpsError(f"{where}: its certificate is refused: {reason}", "correct it, or [redis] tls_ca_file")
        if not isinstance(cause, ssl.SSLError) or _is_closing(cause):
            if "handshake operation timed out" in said:
                return Unreachable(
                    f"{where} does not answer in TLS", "start it; where it runs: is [redis] tls right for this port?"
                )
            continue
        reason = (cause.reason or said).replace("_", " ").lower()
        if "alert" in reason:
            return OpsError(
                f"{where} refuses this client: {reason}",
                "it wants a client's certificate that it knows: [redis] tls_certificate_file and tls_key_file",
            )
        if cause.library in ("X509", "PEM"):
            return OpsError(f"the TLS files of [redis] are of no use: {reason}", f"correct {', '.join(TLS_FILES)}")
        return OpsError(f"{where}: no TLS can be agreed on: {reason}", "is [redis] tls right for this port?")
    return None


def _is_silent(cause: BaseException) -> bool:
    """Whether the other side ended the connection, waited for more of a greeting, or said what is no answer: it may
    speak another language."""
    said = str(cause)
    return _is_closing(cause) or "handshake operation timed out" in said or said.startswith("Protocol Error")


def _is_closing(cause: BaseException) -> bool:
    """Whether the other side ended the connection, which it does without a word."""
    if isinstance(cause, ssl.SSLError):
        return isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError) or not cause.reason
    return isinstance(cause, ConnectionResetError | BrokenPipeError) or "closed by server" in str(cause)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: redis-py wraps the socket's own."""
    for _ in range(5):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
