"""Data that is not used any more, with the runbook that deletes it (§7.1, §7.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blocks.environment import Environment
from flows.database.superseded import find_kept_data
from flows.logs.cleaning import MANUAL_DAYS
from flows.routine.page import NOT_MEASURED, Page
from runbook.errors import OpsError
from runbook.units import size
from tasks.backups.manifest import Kind
from tasks.backups.retention import StoredBackup, read_stores, rule_of
from tasks.docker.inventory import read_inventory
from tasks.logs.reading.files import find_logs
from tasks.postgres.upkeep.indexes import find_duplicates, read_indexes, read_statistics
from tasks.stores.store import store_of

SCANNED_SECONDS = 30 * 86_400
PATIENCE_SECONDS = 5.0
LEAST_BYTES = 1_000_000  # less is not worth a row
KINDS: tuple[Kind, ...] = ("postgres", "redis", "files", "cluster")


@dataclass(frozen=True)
class Saving:
    """Unused data, its size, and the runbook that deletes it."""

    what: str
    bytes: int
    runbook: str


def judge_savings(page: Page) -> str:
    """Everything that the runbooks could free, with links and, if a disk has a price, the monthly cost. If a place
    cannot be checked and nothing is found elsewhere, the result is "not measured"."""
    found, looked = list[Saving](), list[bool]()
    for part, name, find in _FINDERS:
        if not page.names(part):
            continue
        seen = page.part(f"unused: {name}", lambda find=find: list(find(page.env)))  # type: ignore[misc]
        looked.append(seen is not None)
        found += [one for one in seen or () if one.bytes >= LEAST_BYTES]
    told = _report_results(page, sorted(found, key=lambda one: -one.bytes))
    if not found and not all(looked):
        page.not_measured(
            "what could be saved", "not every place could be checked", "fix the findings about these places"
        )
        return NOT_MEASURED
    page.report.prefer("what could be saved", not found, "launch the runbooks in the table", value=told)
    return told


def _report_results(page: Page, found: list[Saving]) -> str:
    cloud = page.env.cloud if page.env.has("cloud") else None
    price = cloud.disk_price if cloud else 0.0

    def money(taken: int) -> str:
        return f"{taken / 1e9 * price:,.2f} {cloud.currency}" if cloud and price else "no price: [cloud] disk_price"

    page.report.table(
        "What could be saved",
        ("what", "bytes", "cost a month", "runbook"),
        [(one.what, size(one.bytes), money(one.bytes), page.launch(one.runbook)) for one in found],
    )
    total = sum(one.bytes for one in found)
    return f"{size(total)} in {len(found)} places ({money(total)})" if found else "nothing"


def _superseded(env: Environment) -> Iterator[Saving]:
    aside = find_kept_data(env, 0)
    for kind in dict.fromkeys(one.kind for one in aside):
        taken = [one for one in aside if one.kind == kind]
        what = f"{len(taken)} × {kind} replaced by a restore"
        yield Saving(what, sum(one.bytes for one in taken), "discard-superseded")


def _logs(env: Environment) -> Iterator[Saving]:
    before = datetime.now(UTC) - timedelta(days=MANUAL_DAYS)
    old = [file for file in find_logs(Path(env.logs.need("app"))) if file.modified < before]
    yield Saving(
        f"{len(old)} rotated logs older than {MANUAL_DAYS} days", sum(file.bytes for file in old), "clean-logs"
    )


def _indexes(env: Environment) -> Iterator[Saving]:
    """Duplicate indexes; unscanned ones only if scans were counted for 30 days."""
    indexes = read_indexes(env.postgres)
    doubles = [other for _, other in find_duplicates(indexes)]
    yield Saving(f"{len(doubles)} duplicate indexes", sum(one.bytes for one in doubles), "check-indexes")
    if read_statistics(env.postgres).seconds >= SCANNED_SECONDS:
        idle = [one for one in indexes if not one.scans and one.valid and not one.is_needed_unused]
        yield Saving(f"{len(idle)} indexes that were never scanned", sum(one.bytes for one in idle), "check-indexes")


def _backups(env: Environment) -> Iterator[Saving]:
    """The backups that prune-backups would delete."""
    stores, rule = [], rule_of(env)
    for kind in KINDS:
        try:
            stores.append((store_of(env, kind, patience_seconds=PATIENCE_SECONDS), (kind,)))
        except OpsError:
            continue
    for (_, kinds), stored in zip(stores, read_stores(stores, env.name), strict=True):
        if isinstance(stored, StoredBackup) and (doomed := stored.doomed(rule)):
            what = f"{len(doomed)} {kinds[0]} backups beyond [backups] keep"
            yield Saving(what, sum(one.manifest.bytes for one in doomed), "prune-backups")


def _docker(env: Environment) -> Iterator[Saving]:
    found = read_inventory(env.docker.host)
    images, stopped = found.dangling_images(), [one for one in found.containers if one.stopped]
    yield Saving(f"{len(images)} images without a name", sum(one.bytes for one in images), "clean-docker")
    yield Saving(f"{len(stopped)} stopped containers", sum(one.bytes for one in stopped), "clean-docker")
    cache = [one for one in found.cache if not one.in_use]
    yield Saving(f"{len(cache)} records of the build cache", sum(one.bytes for one in cache), "clean-docker")


_FINDERS: tuple[tuple[str, str, Callable[[Environment], Iterator[Saving]]], ...] = (
    ("postgres", "replaced by restores", _superseded),
    ("postgres", "indexes", _indexes),
    ("logs", "old logs", _logs),
    ("backups", "old backups", _backups),
    ("docker", "Docker", _docker),
)
