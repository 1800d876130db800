"""A plan that is confirmed as it stands is accepted, of every runbook with `confirm`. No list of runbooks to keep."""

from __future__ import annotations

import contextlib
import itertools
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.application.files import backup_files
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis
from runbook.report import Report, Status
from runbook.wait import until
from tests.redis.servers import running_redis
from tests.stranger.accepted import planned, refusal_of, require_accepted
from tests.stranger.system import NAME, REDIS_PASSWORD, Stranger, running_stranger
from tests.test_deployments import Found
from tests.test_plans import CONFIRMED

State = Callable[[Stranger], contextlib.AbstractContextManager[None]]
# What a form asks for, where the runbook cannot know it.
TEXTS: Mapping[str, Any] = {
    "tables": ["public.users"],
    "prefixes": ("key:",),
    "reason": "a test",
}


@dataclass(frozen=True)
class Plan:
    """A runbook's plan, and the form that it was made with."""

    runbook: Found
    form: dict[str, Any]
    report: Report

    @property
    def undo(self) -> str:
        """The runbook that undoes it, if its plan names one."""
        undo = str(self.report.effect.undo) if self.report.effect else ""
        return undo if undo.startswith("undo-") and " " not in undo else ""


@pytest.fixture(scope="module")
def system() -> Iterator[Stranger]:
    """With every part that it can have, and a backup of each."""
    with running_stranger(alembic=True, wal=True) as found, pytest.MonkeyPatch.context() as patch:
        for name, text in found.variables.items():
            patch.setenv(name, text)
        for flow in (backup_database, backup_redis, backup_files, backup_cluster):
            flow.fn(NAME)
        yield found


def forms(found: Found) -> Iterator[dict[str, Any]]:
    """What people may enter: nothing; the texts that it asks for; and each other choice of one parameter, with them."""
    texts = {name: TEXTS[name] for name in found.parameters if name in TEXTS}
    yield {}
    yield texts
    for name, hint in found.hints.items():
        choices = (
            (False, True)
            if hint is bool
            else typing.get_args(hint)
            if typing.get_origin(hint) is typing.Literal
            else ()
        )
        for choice in choices:
            if choice != found.parameters[name].default:
                yield texts | {name: choice}


def refusals(runbooks: Iterable[Found], plans: dict[str, list[Plan]]) -> list[str]:
    """Plan each runbook in each form, confirm each plan that has something to confirm, and add it to `plans`."""
    found = list[str]()
    for one, form in [(runbook, form) for runbook in runbooks for form in forms(runbook)]:
        report = planned(one.flow.fn, NAME, **form)
        if report.status is not Status.PLANNED:
            continue
        plans.setdefault(one.flow.name, []).append(Plan(one, form, report))
        if refused := refusal_of(one.flow.fn, NAME, report, **form):
            found.append(f"{one.flow.name} {form}: {refused}")
    return found


def test_each_form_confirms_its_own_plan(system: Stranger, stranger: Stranger) -> None:
    """As the system is; then with something to undo: each runbook is carried out whose plan names one that undoes it."""
    plans = dict[str, list[Plan]]()
    refused = refusals(CONFIRMED, plans)
    undoable = {name: found[0] for name, found in plans.items() if found[0].undo}
    runbooks = {one.flow.name: one for one in CONFIRMED}
    for one in undoable.values():
        planned(one.runbook.flow.fn, NAME, **one.form, confirm=NAME)
        refused += refusals([runbooks[one.undo]], plans)  # at once: the next one may leave nothing to undo
    refused += refusals([one for one in CONFIRMED if one.flow.name not in plans], plans)
    assert not refused, "\n".join(refused)
    assert len(undoable) > 5
    assert {one.undo for one in undoable.values()} <= set(plans)


# States of the parts, each healed when its block is left.


@contextlib.contextmanager
def as_it_is(stranger: Stranger) -> Iterator[None]:
    yield


@contextlib.contextmanager
def moved(*paths: Path) -> Iterator[None]:
    """Files or directories that are not there."""
    for path in paths:
        path.rename(path.with_name(f"{path.name}.moved"))
    try:
        yield
    finally:
        for path in paths:
            path.with_name(f"{path.name}.moved").rename(path)


def only_dumps(stranger: Stranger) -> contextlib.AbstractContextManager[None]:
    return moved(stranger.root / "backups/cluster")


def only_base_backups(stranger: Stranger) -> contextlib.AbstractContextManager[None]:
    return moved(stranger.root / "backups/postgres")


@contextlib.contextmanager
def another_database(stranger: Stranger) -> Iterator[None]:
    stranger.sql("CREATE DATABASE payroll")
    try:
        yield
    finally:
        stranger.sql("DROP DATABASE payroll WITH (FORCE)")


@contextlib.contextmanager
def database_server_down(stranger: Stranger) -> Iterator[None]:
    stranger.supervisor.stop("database")
    try:
        yield
    finally:
        stranger.start_database()


@contextlib.contextmanager
def database_directory_missing(stranger: Stranger) -> Iterator[None]:
    with database_server_down(stranger), moved(stranger.root / "pg/data"):
        yield


@contextlib.contextmanager
def emptied_table(stranger: Stranger) -> Iterator[None]:
    """A statement in the WAL, just before which a recovery stops."""
    stranger.sql("CREATE TABLE kept AS SELECT * FROM scores; TRUNCATE scores")
    try:
        yield
    finally:
        stranger.sql("INSERT INTO scores SELECT * FROM kept; DROP TABLE kept")


@contextlib.contextmanager
def redis_down(stranger: Stranger) -> Iterator[None]:
    stranger.supervisor.stop("keys")
    try:
        yield
    finally:
        stranger.supervisor.start("keys")
        until(lambda: stranger.redis().ping(), what="Redis", seconds=120)


@contextlib.contextmanager
def redis_directory_missing(stranger: Stranger) -> Iterator[None]:
    with redis_down(stranger), moved(stranger.root / "redis/data"):
        yield


@contextlib.contextmanager
def replica_of_a_dead_master(stranger: Stranger) -> Iterator[None]:
    follow = [f'masterauth "{REDIS_PASSWORD}"', f"replicaof 127.0.0.1 {stranger.ports['redis']}"]
    with running_redis(settings=follow) as replica, replica.client() as client:
        client.config_set("requirepass", REDIS_PASSWORD)
        until(lambda: client.info("replication")["master_link_status"] == "up", what="its link", seconds=120)
        stranger.describe(("[redis]", f'[redis]\nreplicas = ["{replica.address}"]'))
        try:
            with redis_directory_missing(stranger):
                yield
        finally:
            stranger.describe()


def files_missing(stranger: Stranger) -> contextlib.AbstractContextManager[None]:
    return moved(stranger.backend.parent)


BACKUPS = (as_it_is, only_dumps, only_base_backups)
DATABASE = (as_it_is, another_database, database_server_down, database_directory_missing, emptied_table)
REDIS = (as_it_is, redis_down, redis_directory_missing, replica_of_a_dead_master)
FILES = (as_it_is, files_missing)


def mixes() -> Iterator[tuple[State, ...]]:
    """Every pair of the backups with a state of the database; those of Redis and the files alternate."""
    for number, (backups, database) in enumerate(itertools.product(BACKUPS, DATABASE)):
        yield backups, database, REDIS[number % len(REDIS)], FILES[number // 3 % len(FILES)]


@pytest.mark.parametrize("mix", list(mixes()), ids=lambda mix: "-".join(state.__name__ for state in mix))
def test_a_full_restore_is_accepted_in_every_mix(system: Stranger, stranger: Stranger, mix: tuple[State, ...]) -> None:
    with contextlib.ExitStack() as stack:
        for state in mix:
            stack.enter_context(state(stranger))
        # No Sentinel and no check recorded how far this master was: a person names the replica.
        named = {"redis_source": "replica"} if replica_of_a_dead_master in mix else {}
        require_accepted(full_restore.fn, NAME, **named)
