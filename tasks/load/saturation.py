"""Use of the system's resources during a load test: one sample every two seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit

import psutil

from blocks.environment import Environment
from runbook import metrics
from runbook.errors import OpsError
from tasks.host.disk import is_here
from tasks.postgres.sessions.connections import read_activity
from tasks.redis.clients import read_clients
from tasks.redis.memory.info import read_memory

EVERY_SECONDS = 2.0
CPU = metrics.CPU.name
CONNECTIONS = metrics.CONNECTIONS.name
CLIENTS = metrics.CLIENTS.name
MEMORY = metrics.REDIS_MEMORY.name


@dataclass
class Saturation:
    """Metric → its samples (when, ratio), and what could not be measured, with the reason."""

    env: Environment
    samples: dict[str, list[tuple[datetime, float]]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[str, str] = field(default_factory=dict)
    _next: float = 0.0

    def sample(self) -> None:
        """Take a sample every two seconds. A probe that failed is reported, and tried again."""
        if time.monotonic() < self._next:
            return
        for metric, work in self._probes().items():
            try:
                value = work()
            except OpsError as error:
                self.missing[metric] = error.message
                continue
            if value is None:
                continue
            self.samples[metric].append((datetime.now(UTC), value))
        self._next = time.monotonic() + EVERY_SECONDS

    def _probes(self) -> dict[str, Callable[[], float | None]]:
        env = self.env
        # Their `work`: otherwise the report would have a step for each sample.
        return {
            CPU: self._cpu,
            CONNECTIONS: lambda: read_activity.work(env.postgres).used_ratio,
            CLIENTS: lambda: read_clients.work(env.redis).used_ratio,
            MEMORY: self._memory,
        }

    def _cpu(self) -> float | None:
        """Processor use since the last sample; None for the first."""
        host = urlsplit(self.env.application.url).hostname or ""
        if not is_here(host):
            raise OpsError(f"the application runs on {host}: its processors cannot be measured from here")
        first = self._next == 0.0
        used = psutil.cpu_percent(None) / 100
        return None if first else used

    def _memory(self) -> float | None:
        found = read_memory.work(self.env.redis)
        return (found.used - found.not_counted) / (found.limit or found.host)
