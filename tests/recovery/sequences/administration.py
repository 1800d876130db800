"""The steps of administrators and schedules."""

from __future__ import annotations

import contextlib
import random
import signal

import psycopg

from lab.servers.postgres import DATABASE, ROLE
from runbook.wait import until
from tests.fixtures.postgres.clusters import PROGRAMS
from tests.recovery.sequences.steps import NOT_POSSIBLE, Do, step
from tests.recovery.sequences.world import World

TABLESPACE, SLOT = "extra", "client_slot"


@step("switch-wal", "quiet", 2)
def switch_wal(world: World, chance: random.Random) -> str:
    """Segments of which most is empty, as archive_timeout makes them."""
    times = chance.randint(1, 6)
    with contextlib.suppress(psycopg.Error):
        for _ in range(times):
            world.database.write(chance)
            world.sql("SELECT pg_switch_wal()")
        return str(times)
    return NOT_POSSIBLE


@step("checkpoint", "quiet", 1)
def checkpoint(world: World, chance: random.Random) -> str:
    """CHECKPOINT."""
    with contextlib.suppress(psycopg.Error):
        world.sql("CHECKPOINT")
        return ""
    return NOT_POSSIBLE


@step("alter-system", "quiet", 0.7)
def alter_system(world: World, chance: random.Random) -> str:
    """A setting that only the data directory has."""
    value = f"{chance.randint(5, 20)}MB"
    with contextlib.suppress(psycopg.Error):
        world.sql(f"ALTER SYSTEM SET work_mem = '{value}'")
        world.sql("SELECT pg_reload_conf()")
        until(lambda: world.sql("SHOW work_mem") == [(value,)], what="the setting", seconds=20, every_seconds=0.02)
        world.tokens["settings"] = {"work_mem": value}
        return value
    return NOT_POSSIBLE


@step("tablespace", "quiet", 0.7)
def tablespace(world: World, chance: random.Random) -> str:
    """A tablespace that the base backups do not know, with the client's table in it."""
    path = world.root / f"space_{chance.randrange(1000)}"
    world.system.account.directory(path, 0o700)
    try:
        if not world.sql(f"SELECT 1 FROM pg_tablespace WHERE spcname = '{TABLESPACE}'"):
            world.sql(f"CREATE TABLESPACE {TABLESPACE} OWNER {ROLE} LOCATION '{path}'")
        world.sql(f"ALTER TABLE attempts SET TABLESPACE {TABLESPACE}", DATABASE)
    except psycopg.Error:
        return NOT_POSSIBLE
    return path.name


def backup(flow: str) -> Do:
    """A scheduled backup."""

    def take(world: World, chance: random.Random) -> str:
        ran = world.launch(flow)
        return ran.status or ran.error[:60]

    return take


step("backup-database", "quiet", 1.5)(backup("backup-database"))
step("backup-redis", "quiet", 1)(backup("backup-redis"))
step("backup-cluster", "quiet", 1.5)(backup("backup-cluster"))
step("backup-files", "quiet", 0.7)(backup("backup-files"))


@step("logical-slot", "quiet", 0.8)
def logical_slot(world: World, chance: random.Random) -> str:
    """A consumer of changes makes its slot, or confirms everything until now."""
    try:
        if world.sql(f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{SLOT}'"):
            world.sql(f"SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())", DATABASE)
            return "advanced"
        world.sql(f"SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')", DATABASE)
    except psycopg.Error:
        return NOT_POSSIBLE
    world.tokens["slot"] = SLOT
    return "created"


@step("drop-slot", "quiet", 0.4)
def drop_slot(world: World, chance: random.Random) -> str:
    """The consumer is not needed any more: its slot would keep a dump from being swapped in."""
    if not world.tokens.pop("slot", None):
        return NOT_POSSIBLE
    with contextlib.suppress(psycopg.Error):
        world.sql(f"SELECT pg_drop_replication_slot('{SLOT}')", DATABASE)
        return ""
    return NOT_POSSIBLE


@step("detach-standby", "quiet", 0.5, "standby")
def detach_standby(world: World, chance: random.Random) -> str:
    """The standby is stopped for work on its host. `attach-standby` or a rejoin ends that."""
    if not world.variant.standby or world.standby not in world.running():
        return NOT_POSSIBLE
    world.system.stop(world.standby)
    return world.standby


@step("attach-standby", "quiet", 0.5, "standby")
def attach_standby(world: World, chance: random.Random) -> str:
    """Its service manager starts it."""
    if not world.variant.standby or world.standby in world.running() or not world.is_writable:
        return NOT_POSSIBLE
    if not (world.system.node(world.standby).data / "standby.signal").exists():
        return NOT_POSSIBLE  # it was a primary: it has to be rebuilt
    world.system.supervisor.start(PROGRAMS[world.standby])
    return world.standby


def interrupted(number: signal.Signals) -> Do:
    """The next recovery that changes something is ended by a signal, and then run again."""

    def do(world: World, chance: random.Random) -> str:
        world.tokens["interrupt"] = number, chance.uniform(0.1, 5.0)
        return f"after {world.tokens['interrupt'][1]:.1f} s"

    return do


step("kill-run", "quiet", 0.6)(interrupted(signal.SIGKILL))
step("cancel-run", "quiet", 0.5)(interrupted(signal.SIGTERM))
