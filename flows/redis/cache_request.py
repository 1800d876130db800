"""What clear-cache is asked for (§2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runbook.errors import OpsError
from tasks.redis.cache.selection import Selection, literal_head, of_pattern, of_prefixes
from tasks.redis.cache.server import CacheServer
from tasks.redis.keys import bytes_of

Flushing = Literal["", "database", "all"]


@dataclass(frozen=True)
class Wanted:
    """The parameters of a run, as they belong together. `protected` are the environment's prefixes."""

    protected: tuple[str, ...]
    prefixes: tuple[str, ...]
    pattern: str
    databases: tuple[int, ...]
    all_databases: bool
    only_without_ttl: bool
    flush: Flushing
    include_protected: tuple[str, ...]

    def require_sense(self) -> None:
        """Raises OpsError where they contradict each other, or mean more than they say."""
        given = [bool(self.prefixes), bool(self.pattern), bool(self.flush)]
        strange = [name for name in self.include_protected if name not in self.protected]
        refusals = {
            "say what goes: prefixes, a pattern or flush, one of them": sum(given) != 1,
            "an empty prefix means every key: flush is for that": "" in self.prefixes,
            "only_without_ttl takes keys that were meant to stay: it needs named prefixes": (
                self.only_without_ttl and not self.prefixes
            ),
            "name the databases, or choose all_databases": not self.databases and not self.all_databases,
            "databases and all_databases contradict each other": (
                (self.all_databases or self.flush == "all") and self.databases not in ((), (0,))
            ),
            "to flush every database choose flush=all": self.flush == "database" and self.all_databases,
            f"include_protected names {', '.join(strange)}; protected are {', '.join(self.protected)}": bool(strange),
        }
        for reason, holds in refusals.items():
            if holds:
                raise OpsError(reason, "correct the parameters: nothing was looked at")

    @property
    def head(self) -> bytes:
        """What the pattern's keys begin with."""
        return literal_head(bytes_of(self.pattern, glob=True))

    @property
    def named(self) -> tuple[str, ...]:
        """Protected prefixes that may be touched: included, or named by a prefix or by the pattern's beginning."""
        heads = [bytes_of(prefix) for prefix in self.prefixes] + [self.head]
        return tuple(
            name
            for name in self.protected
            if name in self.include_protected or any(head.startswith(bytes_of(name)) for head in heads)
        )

    @property
    def is_broad(self) -> bool:
        """Whether the number of keys must be confirmed too: it may be data that nobody makes anew."""
        return bool(self.flush or self.only_without_ttl or self.named or (self.pattern and not self.head))

    def selection(self) -> Selection:
        """The keys that are meant; of a flush all of them, so that they can be shown first."""
        guarded = [bytes_of(name) for name in self.protected if name not in self.include_protected]
        if not self.prefixes:
            pattern = self.pattern or "*"
            return of_pattern(bytes_of(pattern, glob=True), guarded, f"pattern {pattern}")
        told = ", ".join(self.prefixes) + (" without a TTL" if self.only_without_ttl else "")
        raw = [bytes_of(prefix) for prefix in self.prefixes]
        return of_prefixes(raw, guarded, f"prefix {told}", without_ttl=self.only_without_ttl)

    def numbers(self, server: CacheServer) -> tuple[int, ...]:
        """The databases that are meant."""
        if self.all_databases or self.flush == "all":
            return tuple(sorted(server.counts))
        return tuple(sorted(set(self.databases)))
