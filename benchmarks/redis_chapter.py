"""What the Redis chapter adds (§2, §8.3): memory report, audit of TTLs, a pattern cleared, over a million keys, each
against redis-cli as the manual uses it, with what another client sees meanwhile; and failovers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import redis_failover
from benchmarks.figures import Figure
from lab.progress import Tell
from lab.state.base import CHECKOUT
from runbook import shell
from runbook.errors import OpsError
from runbook.wait import until
from tests.redis.servers import NAME, PASSWORD, RedisServer, running_redis

KEYS = 1_000_000
ROUNDS = 2
TTL_SAMPLE = 2000
IDLE_SECONDS = 8.0
MEMORY = "flows.redis.memory.check:check_redis_memory"
CLEAR = "flows.redis.cache:clear_cache"
PEER = CHECKOUT / "benchmarks" / "redis_peer.sh"
FILL = """
for n = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local kind = n % 10
  if kind < 6 then redis.call('SET', ARGV[3] .. 'user:' .. n, string.rep('x', 40 + n % 200), 'EX', 3600 + n % 86400)
  elseif kind < 9 then redis.call('SET', ARGV[3] .. 'page:' .. n, string.rep('y', 20 + n % 100))
  else redis.call('HSET', ARGV[3] .. 'hash:' .. n, 'a', n, 'b', 'value ' .. n) end
end
"""


@dataclass
class Beside:
    """What another client saw: seconds per call while something ran."""

    idle: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def figures(self, what: str) -> list[Figure]:
        """Its p99 during each, against when nothing else ran."""
        idle = _p99(self.idle)
        return [
            _against_idle(f"… another client's p99 during {what} ÷ idle", _p99(self.ours), idle, 2.0),
            _against_idle("… the same during redis-cli's", _p99(self.peer), idle),
        ]


@dataclass(frozen=True)
class RedisChapter:
    """The measurements; each returns its lines of the table."""

    tell: Tell

    def figures(self) -> list[Figure]:
        """All of them.

        Raises:
            OpsError: redis-cli is missing, or a side failed.
        """
        if shutil.which("redis-cli") is None:
            raise OpsError("redis-cli is missing", "run tests/matrix/install-redis as root")
        with running_redis(settings=("maxmemory 4gb",)) as server, _registered(server):
            lines = [*self.memory(server), *self.clear(server)]
        return [*lines, *redis_failover.figures(self.tell)]

    def memory(self, server: RedisServer) -> list[Figure]:
        """The report reads every key's TTL as well: that is the audit."""
        _fill(server, "app:")
        ours, peer, ttl = list[float](), list[float](), list[float]()
        beside = Beside(idle=self._idle(server))
        for number in range(ROUNDS):
            with _client(server, beside.ours):
                ours.append(_flow(MEMORY, environment=NAME))
            with _client(server, beside.peer):
                peer.append(_peer(server, "memkeys"))
            ttl.append(_peer(server, "ttl", str(TTL_SAMPLE)) / TTL_SAMPLE)
            self.tell(f"memory {number + 1}: ours {ours[-1]:.1f} s, memkeys {peer[-1]:.1f} s, a TTL {ttl[-1]:.4f} s")
        per_key = [seconds / KEYS for seconds in ours]
        times = Figure.ratio("TTL audit, per key ÷ xargs -I{} redis-cli TTL {} (100 ×)", per_key, ttl, 0.01)
        shown = f"1/{1 / times.value:,.0f} ({times.ours or 0:.2e} s ÷ {times.peer or 0:.2e} s)"
        return [
            Figure.ratio("check_redis_memory, 1 M keys ÷ redis-cli --memkeys", ours, peer, 0.5),
            *beside.figures("the report"),
            Figure(times.name, times.value, times.bar, shown=shown),
        ]

    def clear(self, server: RedisServer) -> list[Figure]:
        """A prefix that all keys have."""
        parameters = {"environment": NAME, "prefixes": ("cache:",), "confirm": NAME}
        ours, peer, beside = list[float](), list[float](), Beside()
        server.client().flushall()
        for number in range(ROUNDS):
            _fill(server, "cache:")
            beside.idle += self._idle(server, IDLE_SECONDS / ROUNDS)
            with _client(server, beside.ours):
                ours.append(_flow(CLEAR, **parameters))
            _fill(server, "cache:")
            with _client(server, beside.peer):
                peer.append(_peer(server, "clear", "cache:*"))
            left = server.client().dbsize()
            if left > 1:  # the client's own
                raise OpsError(f"{left} keys are left", "one side does not clear")
            self.tell(f"clear {number + 1}: ours {ours[-1]:.1f} s, redis-cli {peer[-1]:.1f} s")
        name = "clear_cache, 1 M keys ÷ redis-cli --scan | xargs DEL"
        return [Figure.ratio(name, ours, peer, 0.7), *beside.figures("clearing")]

    def _idle(self, server: RedisServer, seconds: float = IDLE_SECONDS) -> list[float]:
        seen: list[float] = []
        with _client(server, seen):
            time.sleep(seconds)
        return seen


def _fill(server: RedisServer, prefix: str) -> None:
    client = server.client()
    for begin in range(0, KEYS, 50_000):
        client.eval(FILL, 0, begin, begin + 49_999, prefix)


def _flow(target: str, **parameters: Any) -> float:
    """Seconds of the flow's function in a process of its own: what Prefect adds stands in the other figures."""
    argv = [sys.executable, "-m", "benchmarks.call", target, json.dumps(parameters), "--direct"]
    told: dict[str, Any] = json.loads(shell.run(argv, directory=CHECKOUT, inherit=("*",)).stdout.splitlines()[-1])
    return float(told["seconds"])


def _peer(server: RedisServer, *words: str) -> float:
    argv: list[str | Path] = [PEER, str(server.port), *words]
    return shell.run(argv, environment={"REDISCLI_AUTH": PASSWORD}).seconds


@contextlib.contextmanager
def _client(server: RedisServer, seen: list[float]) -> Iterator[None]:
    """Another client beside; its calls' seconds go to `seen`."""
    argv = [sys.executable, "-m", "benchmarks.redis_client", str(server.port)]
    environment = {**os.environ, "REDISCLI_AUTH": PASSWORD}
    child = subprocess.Popen(argv, cwd=CHECKOUT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        _until_it_calls(server)
        yield
    finally:
        told, _ = child.communicate()
    seen += json.loads(told)


def _until_it_calls(server: RedisServer) -> None:
    client = server.client()
    client.delete("bench:client")
    until(
        lambda: client.exists("bench:client"),
        what="a call of the other client",
        seconds=20,
        every_seconds=0.01,
        hint="look at benchmarks/redis_client.py",
    )


@contextlib.contextmanager
def _registered(server: RedisServer) -> Iterator[None]:
    kept = dict(os.environ)
    server.register(redis_failover.Variables())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]


def _against_idle(name: str, busy: float, idle: float, bar: float | None = None) -> Figure:
    shown = f"{busy / idle:.2f} ({busy * 1000:.2f} ms ÷ {idle * 1000:.2f} ms)"
    return Figure(name, busy / idle, bar, busy, idle, shown=shown)
