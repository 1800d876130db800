"""A Redis server's memory against its limits (§2.1)."""

from __future__ import annotations

from runbook import metrics
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.redis.memory.info import Memory

# Below this, the ratio compares the program's own pages with almost no data
# (https://valkey.io/topics/memory-optimization/).
LEAST_FRAGMENTABLE = 100_000_000
CLEAR = Next("clear-cache", "delete cached keys by prefix")
HOST_LIMIT = "three quarters of the host's memory leave space for a BGSAVE"


def judge_memory(report: Report, memory: Memory) -> None:
    """Used memory against maxmemory, or against the host's memory; fragmentation; swap."""
    most = memory.host * 3 // 4
    higher = Next("apply-redis-settings", "raise maxmemory for a time", {"override": f"maxmemory {most}"})
    if memory.limit:
        used = memory.used - memory.not_counted
        hint = "delete cached keys or raise maxmemory"
        of = f"{size(used)} of maxmemory {size(memory.limit)}"
        report.judge(
            metrics.REDIS_MEMORY,
            used / memory.limit,
            hint,
            of=of,
            follow=[CLEAR, higher] if memory.limit < most else [CLEAR],
        )
    else:
        report.warn(
            "maxmemory is 0",
            f"set it: apply-redis-settings with override=“maxmemory …gb”; {HOST_LIMIT}",
            value=f"{size(memory.used)} used; only the host's memory limits it, by killing the server",
            expected="a limit",
            follow=[higher],
        )
    if memory.limit > memory.host:
        hint = f"lower it: apply-redis-settings with override=“maxmemory …gb”; {HOST_LIMIT}"
        value, expected = size(memory.limit), f"at most {size(memory.host)}"
        report.warn("maxmemory is more than the host has", hint, value=value, expected=expected)
    if not 0 < memory.limit <= memory.host:
        of = f"{size(memory.resident)} resident of the host's {size(memory.host)}"
        hint = "delete cached keys or give the host more memory"
        report.judge(metrics.REDIS_HOST_MEMORY, memory.resident / memory.host, hint, of=of, follow=[CLEAR])
    _judge_fragmentation(report, memory)
    report.table("Memory", ("", "value"), _memory_rows(memory))


def _judge_fragmentation(report: Report, memory: Memory) -> None:
    """The ratio is resident ÷ used memory. It shows fragmentation only if all memory is resident, and much of it."""
    ratios = f"ratio {memory.fragmentation:.2f}, allocator {memory.allocator_fragmentation:.2f}"
    if memory.swapped > 0 or (memory.fragmentation < 1 and memory.used >= LEAST_FRAGMENTABLE):
        swapped = size(memory.swapped) if memory.swapped > 0 else f"at most {size(memory.used - memory.resident)}"
        hint = "free memory on the host: each access to a swapped page waits for the disk"
        report.warn("memory is swapped out", hint, value=f"{swapped} ({ratios})", expected="none")
        return
    if memory.used < LEAST_FRAGMENTABLE:
        report.fact("fragmentation", f"{ratios}: not judged below {size(LEAST_FRAGMENTABLE)}")
        return
    hint = "CONFIG SET activedefrag yes, if the server has it; otherwise MEMORY PURGE, or a failover and a restart"
    of = f"{size(memory.fragmentation_bytes)}, allocator {memory.allocator_fragmentation:.2f}"
    report.judge(metrics.REDIS_FRAGMENTATION, memory.fragmentation, hint, of=of)


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    swapped = size(memory.swapped) if memory.swapped >= 0 else "not measured (the server is on another host)"
    return [
        ("used", size(memory.used)),
        ("peak", size(memory.peak)),
        ("resident", size(memory.resident)),
        ("swapped out", swapped),
        ("data", size(memory.dataset)),
        ("overhead (tables, buffers, the program)", size(memory.overhead)),
        ("part of it: clients' buffers", size(memory.client_buffers)),
        ("part of it: replicas' buffers", size(memory.replica_buffers)),
        ("scripts", size(memory.scripts)),
        ("maxmemory", size(memory.limit) if memory.limit else "0 (none)"),
        ("maxmemory-policy", memory.policy),
        ("host", size(memory.host)),
        ("expired keys since its start", f"{memory.expired:,}"),
        ("evicted keys since its start", f"{memory.evicted:,}"),
    ]
