"""The application's database taken out of a recovered cluster, where the live cluster has other databases that must not
be set back. It is dumped from the staged copy of the cluster, with its manifest, and restored like any other dump."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blocks.environment import Environment
from blocks.postgres.server import Connection
from flows.database import restore_steps as database
from flows.database.backup import dump_into
from flows.database.gate import DatabaseGate
from flows.recovery.destruction import newest_dump
from flows.recovery.full import database_server, recovered
from flows.recovery.full.build import SystemCopies
from flows.recovery.full.choose import Chosen
from flows.recovery.full.database_server import FoundServer
from flows.recovery.full.dump import SystemSwap
from flows.recovery.full.recovered import ClusterRun
from flows.recovery.options import RestoreOptions
from flows.recovery.restore_option import DUMP_BYTES_PER_SECOND, RestoreOption
from flows.store import store_for
from runbook.change import Carrier, Change, Line
from runbook.failpoint import failpoint
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from runbook.units import size
from tasks.backups.catalogue import Backup, hand_of
from tasks.cluster.copy import BuiltCluster
from tasks.cluster.instance import put_away
from tasks.postgres.restore.staged_copy import copy_name, dump_in
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import Identity, read_server
from tasks.stores.directory import DirectoryStore

FOLDER = "extracted"


@dataclass
class ExtractedCopies(SystemCopies):
    """The copies; the database's is on the live server. `option`: its origin; `live`: the database that it replaces;
    `guard`: the session that replaces it; `gate`: what the swap must pass."""

    option: RestoreOption = field(kw_only=True)
    live: Identity = field(kw_only=True)
    guard: Connection = field(kw_only=True)
    gate: DatabaseGate = field(kw_only=True)


@dataclass(frozen=True)
class ExtractionLines:
    """The lines of a restore that takes the application's database out of a recovered cluster. `system`: those that
    restore its dump."""

    building: Change[..., BuiltCluster]
    replay: Change[[ClusterRun, RestoreOption, int], tuple[RestoreOption, Backup]]
    system: SystemSwap

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        option: RestoreOption,
        chosen: Chosen,
        found: FoundServer,
        options: RestoreOptions,
        jobs: int,
        *,
        stop_first: bool,
        advance: bool,
    ) -> ExtractionLines:
        """Plan the lines, and judge the live server. The dump does not exist yet, so the newest one in the store stands
        in for it; the run judges the server again with the right one, before anything live is touched."""
        bytes_, name = option.extracted_bytes, env.postgres.database
        dumping = PlannedStep(
            "dump the database",
            f"{name} from that copy, with its manifest",
            bytes_,
            bytes_ / DUMP_BYTES_PER_SECOND,
        )
        replay = recovered.plan_replay(report, env, option, "this", _recover, [dumping])
        seconds, copy = bytes_ / database.RESTORE_BYTES_PER_SECOND, copy_name(name)
        steps = (
            [PlannedStep("restore that dump", f"into the staged copy {copy}", bytes_, seconds)],
            PlannedStep("prove the copy", "every row and definition against that manifest", seconds=seconds / 5),
        )
        revision = options.tables.revision
        system = SystemSwap.plan(report, env, chosen, found, steps, revision, first=stop_first, advance=advance)
        if dump := newest_dump(env, options.source, options.stores):
            database_server.judge(report, env, dump, jobs)
        else:
            hint = "nothing to do: the run judges them before anything live is replaced"
            value = f"{database_server.EVERYTHING}: there is no earlier dump of {name}"
            report.warn("not judged in the plan", hint, value=value)
        return cls(recovered.plan_building(env, option), replay, system)

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        system = self.system
        return [self.building, *system.stopping, self.replay, *system.opening, *system.closing]


def _recover(run: ClusterRun, option: RestoreOption, jobs: int) -> tuple[RestoreOption, Backup]:
    return recovered.recover_to_target(run, option, lambda found, _: (found, _dump(run, found, jobs)))


def build_copies(
    carry: Carrier,
    lines: ExtractionLines,
    run: ClusterRun,
    option: RestoreOption,
    jobs: int,
    accept: Sequence[str],
    stack: contextlib.ExitStack,
) -> ExtractedCopies:
    """Recover the cluster as a private instance, dump the database from it, restore the dump next to the live database,
    and prove it. `stack` keeps the lock of the database until the swap.

    Raises:
        RunbookFailed, VerificationFailed: a copy fails its proof. Nothing live was replaced.
    """
    report, env, system = run.report, run.env, lines.system
    option, backup = carry(lines.replay, run, option, jobs)
    assert option.replay
    put_away(option.replay.instance)  # its disk space is free for the restore
    failpoint("full restore: database extracted")
    dump = database.without_accepted(report, env, dump_in(backup), accept)
    chosen = replace(run.chosen, database=backup, dump=dump)
    known = len(report.findings)
    found = database_server.judge(report, env, backup, jobs)
    # The plan judged the same with another dump.
    report.findings[known:] = [one for one in report.findings[known:] if one not in report.findings[:known]]
    report.fail_if_critical()
    live = system.server.carry_out(carry, backup, found, jobs)
    guard = stack.enter_context(advisory_lock(env.postgres))
    copies = system.build_copies(carry, chosen, system.build.begin(carry, chosen, jobs), jobs, strict=run.strict)
    run.options.used = option
    gate = DatabaseGate(report, env, option.copy(env.postgres.database, _replaced(option, live)).of_database())
    gate.read_ahead()
    return ExtractedCopies(**vars(copies), option=option, live=live, guard=guard, gate=gate)


def _replaced(option: RestoreOption, live: Identity) -> set[int]:
    """The OIDs of the databases whose writes are replaced: the live one, and the one that a statement dropped."""
    destroyed = option.replay.target.destruction if option.replay else None
    return {oid for oid in (live.oid, destroyed.database if destroyed else 0) if oid}


def _dump(run: ClusterRun, option: RestoreOption, jobs: int) -> Backup:
    """The database of the running copy as a dump on this host, deleted when the run ends. A killed run's is deleted by
    the next one. Its time is that of the newest write in it."""
    assert option.replay
    report, env, postgres = run.report, run.env, option.replay.instance.postgres
    hand = hand_of(store_for(env, "postgres"), env.name)

    def delete() -> None:
        shutil.rmtree(hand / FOLDER, ignore_errors=True)
        with contextlib.suppress(OSError):  # fetched files are still there
            hand.rmdir()

    delete()  # an earlier attempt's
    report.at_end(delete)
    dumped, backup = dump_into(DirectoryStore(hand / FOLDER), env, postgres, read_server(postgres), jobs)
    text = f"{dumped.content.rows:,} rows in {len(dumped.content.tables)} tables, dumped in {dumped.dump_seconds:.1f} s"
    report.fact("database taken out of the cluster", f"{text} ({size(backup.manifest.bytes)})")
    return replace(backup, manifest=backup.manifest.model_copy(update={"taken": option.newest}))


def swap(carry: Carrier, lines: ExtractionLines, run: ClusterRun, copies: ExtractedCopies) -> None:
    """Make the copies live by rename.

    Raises:
        OpsError: a live part is not the one that was judged.
    """
    chosen = replace(run.chosen, database=copies.option.backup)  # the kept database's comment names it
    lines.system.swap_in(carry, chosen, copies, copies.live, copies.guard, copies.gate)
