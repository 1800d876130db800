"""The last save of a server before a run stops it (§2.3).

The run keeps its data directory, and an undo returns to it. A server writes what it has at its stop only if it has an
AOF or rules for automatic saves, and a service manager kills one that saves for too long. So without an AOF the data is
saved and proven before the stop, while no client can write.

https://valkey.io/commands/shutdown/ and https://valkey.io/commands/client-pause/
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.kinds import probe
from tasks.redis.failover.pause import LONGEST_SECONDS, Pause
from tasks.redis.persistence.place import inspect_place
from tasks.redis.persistence.saving import bgsave
from tasks.redis.persistence.state import Persistence, ask
from tasks.redis.restore.place import Precondition
from tasks.redis.rights import find_refused
from tasks.redis.scratch import scratch_server
from tasks.redis.server import call, connected, key_counts, live_directory, loaded_keys
from tasks.redis.settings.file import read_configuration

RESET = "cmdstat_config|resetstat"
"""A reset of the counters counts itself."""
BY_HAND = "or stop Redis by hand, then run this again: what it has not saved is lost then"


@dataclass(frozen=True)
class LastState:
    """A server's last state. `writes`: calls of writing commands by clients since its start; None: unknown. `replid`,
    `offset`: its replication stream, and how far it is."""

    run_id: str
    keys: int
    writes: int | None
    replid: str
    offset: int


@contextlib.contextmanager
def final_save(block: Redis, directory: Path) -> Iterator[LastState | None]:
    """Hold all writes until the end of the block, and ensure that the files in `directory` have every key. None: no
    server answers, or it still loads: it has nothing that its files lack.

    Raises:
        OpsError: the data cannot be saved, or the saved file lacks keys. Nothing was stopped.
    """
    try:
        server = ask(block)
    except Unreachable:
        yield None
        return
    is_whole = has_whole_aof(server, directory)
    with contextlib.ExitStack() as stack:
        # An AOF gets every write; without this right it is only unknown how many there were.
        with contextlib.suppress(*([OpsError] if is_whole else [])):
            stack.enter_context(Pause(block, LONGEST_SECONDS))
        if not is_whole:
            _save(block, server, directory)
        yield read_last_state(block)


@probe
def read_last_state(block: Redis) -> LastState:
    """The state of a running server. A client can write afterwards, unless writes are paused.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    with connected(block) as client:
        run_id, writes = str(client.info("server")["run_id"]), None
        with contextlib.suppress(redis.ResponseError):  # this user may not read the statistics
            writes = None if RESET in client.info("commandstats") else client_writes(client)
        keys, stream = sum(keys for keys, _ in key_counts(client).values()), client.info("replication")
        return LastState(run_id, keys, writes, str(stream["master_replid"]), int(stream["master_repl_offset"]))


def has_lost_directory(block: Redis) -> bool:
    """Whether a server answers whose data directory was deleted, also if it was created again: it can save nowhere, and
    its data is only in its memory. It refuses to leave that directory: `dir` cannot be set at run time."""
    with contextlib.suppress(OpsError):
        return not ask(block).settings["dir"] or not live_directory(block).is_dir()
    return False


def has_whole_aof(server: Persistence, directory: Path) -> bool:
    """Whether the server writes an AOF to `directory`, and all its files are there. During the first rewrite after the
    AOF was switched on, they are those of an earlier time."""
    if not (server.appendonly and server.state.write_ok) or server.state.rewriting:
        return False
    place = inspect_place(server)
    return not place.trouble and place.directory.resolve() == directory and bool(place.aof) and not place.missing


def judge_final_save(block: Redis) -> Iterator[Precondition]:
    """Whether the live data can be saved before the stop. A server that does not answer has nothing to save."""
    try:
        server = ask(block)
        with connected(block) as client:
            refused = find_refused(client, block, ("CLIENT", "PAUSE", "1", "WRITE"), ("BGSAVE",))
    except OpsError:
        return  # reported elsewhere
    name, live, place = "the live data can be saved for the undo", live_directory(block), inspect_place(server)
    if has_lost_directory(block):
        yield Precondition(
            name, True, value=f"{place.trouble}: its {server.keys:,} keys are backed up over the network"
        )
    elif has_whole_aof(server, live):
        yield Precondition(name, True, value="its AOF has every write")
    elif refused:
        yield Precondition(name, False, refused[0].hint, refused[0].message)
    elif place.trouble:
        yield Precondition(name, False, f"{place.remedy}; {BY_HAND}", place.trouble)
    else:
        yield Precondition(name, True, value="it has no AOF: it is saved before the stop, while no client can write")


def _save(block: Redis, server: Persistence, directory: Path) -> None:
    try:
        bgsave(block, server)
        _prove(block, directory)
    except OpsError as error:
        raise OpsError(
            f"the live data cannot be saved before the stop, so that nothing could undo it: {error.message}",
            f"{error.hint}; {BY_HAND}" if error.hint else BY_HAND.removeprefix("or "),
        ) from None


def _prove(block: Redis, directory: Path) -> None:
    """A scratch server loads what the live one has. Writes and expiry are paused."""
    rdb = read_configuration(Path(block.config_file)).rdb
    with connected(block) as client:
        live, lasting = key_counts(client), persistent_keys(client)
    most, expiring = (sum(counts) for counts in zip(*live.values(), strict=True)) if live else (0, 0)
    with scratch_server(block, directory, rdb=rdb, user=block.os_user) as scratch:
        loaded, kept = loaded_keys(scratch), persistent_keys(scratch)
    if +Counter(kept) != +Counter(lasting) or not expiring + sum(lasting.values()) <= loaded <= most:
        raise VerificationFailed(f"{directory / rdb} has {loaded:,} keys, and the server {most:,}", "check its disk")


def persistent_keys(client: redis.Redis) -> dict[int, int]:
    """The keys of each database that cannot expire: without a TTL, and no hash with expiring fields, which expires with
    its last field. Valkey and Redis name those differently (https://valkey.io/commands/info/)."""
    return {
        int(name.removeprefix("db")): int(found["keys"])
        - int(found["expires"])
        - int(found.get("keys_with_volatile_items", found.get("subexpiry", 0)))
        for name, found in client.info("keyspace").items()
    }


def client_writes(client: redis.Redis) -> int:
    """Calls of writing commands since the server's start (without replayed ones of the AOF)."""
    writing = {name.decode() for name in call(client, "COMMAND LIST", "FILTERBY", "ACLCAT", "write")}
    writing |= {"eval", "evalsha", "fcall", "exec"}
    stats = client.info("commandstats")
    return sum(
        int(found["calls"]) for name, found in stats.items() if name.removeprefix("cmdstat_").split("|")[0] in writing
    )
