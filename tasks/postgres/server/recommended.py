"""The manual's settings of PostgreSQL (§1.3, §1.5), and one setting of a server in comparable units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runbook.errors import OpsError

Accepted = Literal["this", "more", "less"]


@dataclass(frozen=True)
class RecommendedPostgresSettings:
    """A setting of the manual: its value, its section, and the other accepted values: none, all higher or all lower.

    Memory, connections and WAL are minima for a bigger server; autovacuum can always be more eager.
    """

    name: str
    value: str
    section: str
    accepted: Accepted = "this"

    def __str__(self) -> str:
        return {"this": self.value, "more": f"{self.value} or more", "less": f"{self.value} or less"}[self.accepted]


RECOMMENDED = (
    RecommendedPostgresSettings("autovacuum", "on", "§1.3"),
    RecommendedPostgresSettings("autovacuum_max_workers", "3", "§1.3", "more"),
    RecommendedPostgresSettings("autovacuum_naptime", "1min", "§1.3", "less"),
    RecommendedPostgresSettings("autovacuum_vacuum_threshold", "50", "§1.3", "less"),
    RecommendedPostgresSettings("autovacuum_analyze_threshold", "50", "§1.3", "less"),
    RecommendedPostgresSettings("autovacuum_vacuum_scale_factor", "0.1", "§1.3", "less"),
    RecommendedPostgresSettings("autovacuum_analyze_scale_factor", "0.05", "§1.3", "less"),
    RecommendedPostgresSettings("max_connections", "200", "§1.5", "more"),
    RecommendedPostgresSettings("shared_buffers", "256MB", "§1.5", "more"),
    RecommendedPostgresSettings("effective_cache_size", "1GB", "§1.5", "more"),
    RecommendedPostgresSettings("maintenance_work_mem", "64MB", "§1.5", "more"),
    RecommendedPostgresSettings("checkpoint_completion_target", "0.9", "§1.5"),
    RecommendedPostgresSettings("wal_buffers", "16MB", "§1.5", "more"),
    RecommendedPostgresSettings("default_statistics_target", "100", "§1.5", "more"),
    RecommendedPostgresSettings("random_page_cost", "1.1", "§1.5"),
    RecommendedPostgresSettings("effective_io_concurrency", "200", "§1.5", "more"),
    RecommendedPostgresSettings("work_mem", "4MB", "§1.5", "more"),
    RecommendedPostgresSettings("min_wal_size", "1GB", "§1.5", "more"),
    RecommendedPostgresSettings("max_wal_size", "4GB", "§1.5", "more"),
)
BY_NAME: Mapping[str, RecommendedPostgresSettings] = {one.name: one for one in RECOMMENDED}
MANUAL: Mapping[str, str] = {one.name: one.value for one in RECOMMENDED}
AUTOVACUUM = tuple(one.name for one in RECOMMENDED if one.section == "§1.3")
_BYTES = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40, "8kB": 8 << 10}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS: Mapping[str, float] = {**_BYTES, **_SECONDS}
# Values from these sources override ALTER SYSTEM.
_ABOVE = {"command line", "environment variable", "override"}
_NARROWER = {"database", "user", "database user", "client", "session"}


@dataclass(frozen=True)
class RecommendedSetting:
    """One setting of the server. `shown`: the running value as text; `filed`: the value in the files (empty: none);
    `auto`: the value by ALTER SYSTEM (None: none)."""

    name: str
    shown: str
    value: str
    unit: str
    kind: str
    context: str
    source: str
    pending_restart: bool
    least: str
    most: str
    filed: str
    auto: str | None

    @property
    def needs_restart(self) -> bool:
        """Whether a reload is not enough."""
        return self.context == "postmaster"

    @property
    def is_fixed(self) -> bool:
        """Whether ALTER SYSTEM has no effect, because the server was started with this value."""
        return self.source in _ABOVE

    @property
    def coming(self) -> str:
        """The value after a reload or a restart. At −1 (wal_buffers) the server chooses it."""
        chosen = self.filed == self.least == "-1" and not self.pending_restart
        return self.value if self.is_fixed or chosen else self.filed or self.value

    @property
    def is_narrower(self) -> bool:
        """Whether this login has its own value, so that the server's own was not measured."""
        return self.source in _NARROWER

    def is_value(self, wanted: str) -> bool:
        """Whether it runs with `wanted`, in any unit."""
        return self.same(self.value, wanted)

    def is_filed(self, wanted: str) -> bool:
        """Whether ALTER SYSTEM has already set `wanted`."""
        return self.auto is not None and self.same(self.auto, wanted)

    def is_accepted(self, text: str) -> bool:
        """Whether a value is the manual's or another accepted one."""
        found, manual = self.measure(text), self.measure(MANUAL[self.name])
        if isinstance(found, str) or isinstance(manual, str) or BY_NAME[self.name].accepted == "this":
            return found == manual
        return found >= manual if BY_NAME[self.name].accepted == "more" else found <= manual

    def is_lower(self, wanted: str) -> bool:
        """Whether `wanted` is lower than the running value."""
        new, now = self.measure(wanted), self.measure(self.value)
        return isinstance(new, float) and isinstance(now, float) and new < now

    def same(self, first: str, second: str) -> bool:
        """Whether two texts are the same value."""
        return self.measure(first) == self.measure(second)

    def measure(self, text: str) -> float | str:
        """A value in bytes or seconds, or the text itself.

        Raises:
            OpsError: it is not a value of this setting.
        """
        plain = text.strip().strip("'")
        if self.kind == "bool":
            if plain.lower() not in _BOOLEANS:
                raise self._wrong(text)
            return _BOOLEANS[plain.lower()]
        number = plain.rstrip("kMGTBusmindh ")
        unit = plain[len(number) :].strip() or self.unit
        if unit not in ("", *_UNITS) or (unit and not self.unit) or (unit in _BYTES) != (self.unit in _BYTES):
            raise self._wrong(text)
        try:
            return round(float(number) * _UNITS.get(unit, 1.0), 6)
        except ValueError:
            raise self._wrong(text) from None

    def require_possible(self, wanted: str) -> None:
        """Refuse values that the server would refuse at ALTER SYSTEM or, worse, at its next start.

        Raises:
            OpsError: not a value of this setting, or out of its range.
        """
        value = self.measure(wanted)
        if isinstance(value, float) and self.least and self.most:
            low, high = self.measure(self.least), self.measure(self.most)
            special = self.least == "-1" and wanted.strip() == "-1"
            if not special and not (float(low) <= value <= float(high)):
                raise OpsError(f"{self.name} = {wanted} is out of range", f"choose {self.least} to {self.most}")

    def _wrong(self, text: str) -> OpsError:
        example = MANUAL.get(self.name, "")
        return OpsError(f"“{text[:40]}” is not a value of {self.name}", f"write it like {example}")


_BOOLEANS = {**dict.fromkeys(("on", "true", "yes", "1"), "on"), **dict.fromkeys(("off", "false", "no", "0"), "off")}
