"""Metrics of another host, from its watcher."""

from __future__ import annotations

from datetime import datetime

import httpx
from prometheus_client.parser import text_string_to_metric_families

from runbook import metrics
from runbook.errors import OpsError

ANSWER_SECONDS = 5.0
OLD_SECONDS = 180.0
ROUND = "ops_watch_last_round_timestamp_seconds"
SERVED = {"ops_host_disk_used_ratio": metrics.DISK.name, "ops_host_cpu_used_ratio": metrics.CPU.name}


def read_host_values(address: str, environment: str, host: str, now: datetime) -> dict[str, float | None]:
    """Metric → newest value; None: that watcher could not measure it.

    Raises:
        OpsError: the watcher does not answer, serves another host, or its last round is old.
    """
    todo = f"check the watcher on {host}, and [monitoring.hosts]"
    try:
        answer = httpx.get(address, timeout=ANSWER_SECONDS, trust_env=False).raise_for_status()
        samples = [one for family in text_string_to_metric_families(answer.text) for one in family.samples]
    except (httpx.HTTPError, ValueError) as error:
        raise OpsError(f"the watcher of {host} at {address} does not answer ({type(error).__name__})", todo) from None
    own = {
        one.name: one.value
        for one in samples
        if one.labels.get("environment") == environment and one.labels.get("host", "") in ("", host)
    }
    age = now.timestamp() - own.get(ROUND, 0.0)
    if age > OLD_SECONDS:
        told = f"has not measured for {age:.0f} s" if ROUND in own else f"does not watch {environment} on {host}"
        raise OpsError(f"the watcher of {host} {told}", todo)
    return {metric: own.get(name) for name, metric in SERVED.items()}
