"""Everything in another region, from what was replicated there (§8.3, scenario 2 of §8.4).

It also runs without a Prefect server, which was in the region that failed:

    python -m flows.recovery.region.failover --environment lab-dr --source lab --confirm lab-dr
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field, replace
from typing import get_args

from prefect import flow

from blocks.environment import Environment, Stores
from flows.database import expectations
from flows.database import restore_steps as database
from flows.launch import launch
from flows.pinned import pin_database
from flows.recovery.full import choose
from flows.recovery.full.stopped_services import Held
from flows.recovery.point import choice, swap
from flows.recovery.region import build, summary
from flows.recovery.region.build import Region
from flows.recovery.region.options import Way, Ways, require_known, weighing
from flows.recovery.region.summary import Phases
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook
from tasks.application.endpoint import SEND, send_users
from tasks.backups.catalogue import LATEST
from tasks.failover.fencing import Fencing, named_person
from tasks.failover.region import find_region
from tasks.postgres.restore.staged_copy import dump_in
from tasks.wal.archive.archive import Archive


@flow(name="region-failover", flow_run_name="region-failover {source} to {environment}")
def region_failover(
    environment: str,
    source: str = "",
    backup: str = LATEST,
    fenced_by: str = "",
    without: tuple[choose.Part, ...] = (),
    strict: bool = False,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    plan: str = "",
    confirm: str = "",
) -> Report:
    """リージョン切り替え (§8.3)

    Brings database, Redis and application up in another region whose hosts are empty, from the backups and the WAL that
    were replicated to it, proves them, and then sends users there. Run it when a whole region is lost, or cannot be
    reached and will not come back within the RTO.

    The database comes back by the way with the least loss: the newest base backup and all the WAL that came here, else
    the newest dump. What does not stand its proof is said, and the next best is taken. Redis and files are those
    nearest to that moment. Everything is proven beside, then put in place and started: health, expectations, a log-in,
    a session, an AI answer. Users are sent here last, by one file that is written whole or not at all.

    Two regions that serve would both take writes: it is refused while anything of the old one answers, or still sends
    WAL. What nobody here can see must be attested (fenced_by), and is reported apart from what is proven; it is looked
    at again after the confirmation, and before users are sent.

    Killed anywhere, launch it again: until users are sent here it begins anew; afterwards it changes nothing. Evidence:
    the newest point, what may be lost, each phase's seconds. Afterwards: backup-cluster at once.

    Departs from the manual, which names the scenario and no procedure.

    Args:
        environment: 切り替え先の環境 (リージョン)
        source: 障害が起きた環境 (必須)。そのバックアップが切り替え先の保管先にある
        backup: latest は損失が最小の方法を自動選択。または最初に試すバックアップ名 (base_… または backup_…)
        fenced_by: 旧リージョンを遮断した人の氏名と方法。ここから確認できない場合に必須
        without: 戻さない部分。バックアップも既存データもない部分は、ここに指定したときだけ空で始める
        strict: バックアップの時点で既に破られていた期待値 (expectations) があれば、ユーザーを切り替える前に中止する
        accept: 復元しないまま進めるオブジェクトの名前 (中止されたリストアのレポートが示すもの)。空なら、すべて復元する
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 切り替え先の環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    expectations.prepare(env)
    with runbook("Region failover", env, confirm, plan, changes=True, rank="recovery") as report:
        old, phases = other_region(env, source), Phases()
        if unknown := set(without) - set(get_args(choose.Part)):
            raise OpsError(f"without is {', '.join(sorted(unknown))}", "choose redis, files or both")
        require_known(env, source, backup)
        if summary.judge_users(report, env, old):
            summary.tell_after(report, env, old)
            report.outcome = f"users are sent to {env.name} already: nothing was changed"
            return report
        fence = Fence(old, named_person(fenced_by))
        with phases.of("decision"):
            fence.judge(report, "before the plan")
            ways = Ways(report, env, source, backup)
            parts = Parts(without, tuple(accept))
            way, chosen = _choose(report, env, ways, fence, parts)
        build.plan(report, env, way, chosen)
        report.plan("send users here", f"{env.endpoint.file}: {env.application.url}, when all of it is proven")
        pin_database(report, env.postgres)
        permit = report.permit(*_acts(env, chosen))
        report.state_is("nothing serves here, and no user is sent here", "launch it again when that is put right")
        fence.judge(report, "after the confirmation")
        held = _bring_back(report, permit, env, ways, way, chosen, parts, phases, strict=strict)
        with phases.of("switch"):
            fence.judge(report, "before users are sent here", held.last)
            sent = send_users.after(held.last)(permit, env.endpoint, env.application)
        report.state_is(f"users are sent to {env.name}", "do not launch this again: look at what is said above")
        summary.tell_switch(report, env, sent)
        summary.tell_loss(report, env, old, ways.taken or way)
        phases.report_results(report, env)
        summary.tell_after(report, env, old)
        report.outcome = f"{env.name} serves, and users are sent there"
    return report


def _acts(env: Environment, chosen: choose.Chosen) -> tuple[Act, ...]:
    """Whichever way it will be."""
    return (*dict.fromkeys([*chosen.acts(env), *swap.acts(env)]), Act(SEND, env.endpoint.file))


@dataclass(frozen=True)
class Parts:
    """What is not restored: whole parts, and objects of the database that a person accepted by name."""

    without: tuple[choose.Part, ...]
    accepted: tuple[str, ...]

    def choose(self, report: Report, env: Environment, way: Way) -> choose.Chosen:
        """All backups that are restored together. A base backup leaves no object out."""
        chosen = choose.with_others(report, env, way.backup, way.newest, "backups", self.without)
        if way.replay:
            return chosen
        dump = database.without_accepted(report, env, dump_in(way.backup), self.accepted)
        report.fail_if_critical()
        return replace(chosen, dump=dump)


def _choose(report: Report, env: Environment, ways: Ways, fence: Fence, parts: Parts) -> tuple[Way, choose.Chosen]:
    way = ways.choose()
    if way.replay and fence.archive is None:
        fence.watch(way.replay.origin.archive)
    return way, parts.choose(report, env, way)


def _bring_back(
    report: Report,
    permit: Permit,
    env: Environment,
    ways: Ways,
    way: Way,
    chosen: choose.Chosen,
    parts: Parts,
    phases: Phases,
    *,
    strict: bool,
) -> Held:
    """By the first way that stands its proof.

    Raises:
        OpsError: none does.
    """
    choice.ship_rest(report, env)
    while True:
        ready = contextlib.ExitStack()
        with (
            phases.of("build and proof"),
            weighing(report, way.backup.name) as weighed,
            contextlib.ExitStack() as stack,
        ):
            finish = build.prepare(Region(report, permit, env, way, chosen, strict), stack)
            ready = stack.pop_all()
        if not weighed.why:
            break
        ways.tried.add(way.backup.name)
        way = ways.choose()
        chosen = parts.choose(report, env, way)
    ways.taken = way
    with ready, phases.of("bring up"):
        held = finish()
    summary.tell_proof(report, way)
    report.fail_if_critical()
    return held


def main() -> int:
    """The command line: through Prefect where it answers, else without it."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.recovery.region.failover", description="リージョン切り替え (§8.3): region failover"
    )
    parser.add_argument("--environment", required=True, help="the region to go to")
    parser.add_argument("--source", required=True, help="the environment that failed")
    parser.add_argument("--backup", default=LATEST, help="latest, or the name of the backup to begin with")
    parser.add_argument("--fenced-by", default="", help="who has cut the old region off, and how")
    parser.add_argument("--without", nargs="*", default=[], choices=get_args(choose.Part), help="do not bring back")
    parser.add_argument("--strict", action="store_true", help="refuse data that broke an expectation when backed up")
    parser.add_argument("--accept", nargs="*", default=[], help="objects to leave out, as a refused restore names them")
    parser.add_argument("--confirm", default="", help="the environment's name; without it the plan is shown")
    return launch(region_failover, vars(parser.parse_args()))


def other_region(env: Environment, source: str) -> Environment:
    """The environment that failed.

    Raises:
        OpsError: none was named, it is this one, or nobody knows it.
    """
    if not source.strip():
        raise OpsError("no source was given", "name the environment that failed: its backups are in this one's stores")
    if source == env.name:
        raise OpsError(
            f"{source} is to take over from itself",
            "environment is the region to go to, source the one that failed; in place it is full-restore",
        )
    if not env.has("endpoint"):
        raise OpsError(f"{env.name} names no endpoint", "add [endpoint] to its TOML: how users are sent to it")
    if not env.application.url:
        raise OpsError(f"[application] url of {env.name} is not configured", "add it: users are sent there")
    if not (env.has("application") and env.has("backups")):
        raise OpsError(f"{env.name} is no place for the application", f"add {get_args(Stores)[0]} and application")
    return Environment.find(source)


@dataclass
class Fence:
    """What is known of the old region; `shipped` are the files of its WAL that were in the archive at the first
    look."""

    old: Environment
    attested: str
    archive: Archive | None = None
    shipped: frozenset[str] = field(default_factory=frozenset)

    def judge(self, report: Report, when: str, after: object = None) -> Fencing:
        """Look at it.

        Raises:
            RunbookFailed: it answers, sends WAL, or nobody has proven or attested that it is cut off.
        """
        found = find_region.after(after)(self.old)
        report.table(
            f"Fence of {found.server}, {when}",
            ("what", "holds", "seen"),
            [(row.what, _word(row.holds, self.attested), row.seen) for row in found.rows],
        )
        against, unknown = found.against, found.unknown
        report.require(
            f"the region {found.server} is dead ({when})",
            not against,
            against[0].hint if against else "",
            value="; ".join(f"{row.what}: no, {row.seen}" for row in against[:3]) or "nothing of it was seen alive",
            expected="nothing answers, and nothing starts it again",
        )
        if unknown and not against:
            report.require(
                f"the region {found.server} is cut off ({when})",
                bool(self.attested),
                unknown[0].hint,
                value=f"attested: {self.attested}" if self.attested else f"{unknown[0].what}: {unknown[0].seen}",
                expected="proven, or attested by a named person",
            )
        self._judge_silence(report, when)
        told = f"attested for {len(unknown)} of {len(found.rows)}: {self.attested}" if unknown else "proven"
        report.fact(f"fence of {found.server}", told)
        report.fail_if_critical()
        return found

    def watch(self, archive: Archive) -> None:
        """From now on its WAL must not grow: somebody would be writing."""
        self.archive, self.shipped = archive, frozenset(archive.place.names())

    def _judge_silence(self, report: Report, when: str) -> None:
        if self.archive is None:
            return
        new = sorted(frozenset(self.archive.place.names()) - self.shipped)
        report.require(
            f"no new WAL of {self.old.name} ({when})",
            not new,
            "somebody there lives and sends it: cut that off, then launch this again: it takes what has come along",
            value=", ".join(name[:40] for name in new[:3]) or "none has come since this run began",
        )


def _word(holds: bool | None, attested: str) -> str:
    if holds is None:
        return "attested" if attested else "not known"
    return "proven" if holds else "NO"


if __name__ == "__main__":
    sys.exit(exit_code(main))
