"""The report of a PostgreSQL failover (§8.3): the phases, the loss and its proof, what is left to do."""

from __future__ import annotations

from blocks.environment import Environment
from flows.recovery.postgres.pair import ServerPair
from flows.recovery.postgres.promotion import Done, Phases
from flows.recovery.postgres.rejoin_checks import join_there
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.failover.ledger import WriteLoss
from tasks.failover.member import read_member
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address, read_synchrony
from tasks.wal.format.names import lsn_text

_WHAT = {
    "decision": "from the run's start until the confirmed plan was judged again",
    "fencing": "stopped the old primary and proved it",
    "replay of the tail": "replayed all received WAL",
    "promote": "pg_promote",
    "first acknowledged write": "from pg_promote's call until a client's commit was acknowledged",
    "application": "changed the connection string, restarted, until healthy",
    "rejoin": "rejoined the old primary, until it streamed",
}


def report_phases(report: Report, phases: Phases) -> None:
    """Report the seconds of each phase."""
    found = {name: phases.seconds[name] for name in _WHAT if name in phases.seconds}
    report.table(
        "Phases",
        ("phase", "seconds", "what"),
        [(name, f"{seconds:.3f}", _WHAT[name]) for name, seconds in found.items()],
    )
    for name, seconds in found.items():
        report.fact(name, f"{seconds:.3f} s")


def report_promotion(report: Report, pair: ServerPair, done: Done, attested: str) -> None:
    """Report the evidence of fence, replay and promotion. `attested`: by whom, where the fence is not fully proven."""
    fencing = done.promoted.fencing
    unproven = f"attested by {attested}" if attested and fencing.unknown else "unknown"
    report.table(
        f"Fence of {fencing.server}, checked last before pg_promote",
        ("what", "holds", "seen"),
        [(row.what, "proven" if row.holds else unproven, row.seen) for row in (*fencing.rows, done.fenced.kept_down)],
    )
    report.table(
        "Received WAL, all replayed",
        ("where", "directory", "not replayed"),
        [
            (source.name, source.directory, source.problem or size(source.beyond.bytes))
            for source in done.replayed.fed.sources
        ],
    )
    report.fact(
        "promoted",
        f"{address(pair.new)} at {lsn_text(done.promoted.switched_at)}, now on timeline {done.promoted.timeline}",
    )


def report_loss(report: Report, pair: ServerPair, done: Done, account: WriteLoss) -> None:
    """Report the loss as the gate measured it before the promotion."""
    _report_ledger(report, pair, account)
    loss = done.replayed.lost.loss
    report.loses(loss)
    if loss.is_none:
        report.fact("acknowledged writes lost", done.replayed.lost.evidence)
        return
    hint = "compare with the application's records of the time before the failure; rejoin-standby saves that WAL"
    if loss.unknown:
        hint = "compare with the application's records of the time before the failure"
    report.warn("acknowledged writes lost", hint, value=loss.detail, expected="0")
    report.fact("acknowledged writes lost", "unknown" if loss.unknown else f"at most {loss.count:,} transactions")


def _report_ledger(report: Report, pair: ServerPair, account: WriteLoss) -> None:
    new = address(pair.new)
    servers = dict.fromkeys([address(pair.old), new, *(entry.server for entry in account.entries)])
    rows = []
    for server in servers:
        found = account.on(server)
        lost = sum(entry.number in account.missing for entry in found)
        rows.append((server, len(found), found[-1].number if found else "", len(found) - lost))
    report.table(
        "Acknowledged test writes of this run",
        ("acknowledged by", "writes", "last number", f"present on {new}"),
        rows,
    )
    report.require(
        "acknowledged test writes of this run",
        not account.missing,
        "compare with the application's records: its writes are lost in proportion",
        value=f"{len(account.entries) - len(account.missing):,} of {len(account.entries):,} present; "
        f"{account.indeterminate} without an answer",
        expected="all acknowledged ones",
    )


def report_follow_up(report: Report, env: Environment, pair: ServerPair, *, rejoined: bool) -> None:
    """Report that there is one primary, what protects it, and what is left to do."""
    new, old = read_member(pair.new), read_member(pair.old)
    report.require(
        "one primary",
        new.is_primary and not old.is_primary,
        f"stop the service {pair.old.service} now: until then two servers take writes",
        value=", ".join(one.address for one in (new, old) if one.is_primary) or "none",
        expected=new.address,
    )
    sync = read_synchrony(pair.new)
    waits = f"wait for {sync.needed} of {', '.join(sync.connected)}" if sync.needed else "wait for no standby"
    report.fact("commits on the new primary", waits)
    if not rejoined:
        where = "" if is_here(pair.old.host) else f" ({join_there(env, pair.old)})"
        report.warn(
            "standby",
            f"find out why the old primary died, then rejoin it{where}: until then there is no standby",
            value=f"{old.address} has not rejoined",
            follow=[Next("rejoin-standby", "rejoin the old primary")],
        )
    if env.has("wal"):
        report.warn(
            "base backup",
            "take one now: until then a recovery starts from the old timeline's backup",
            value=f"none of timeline {new.timeline}",
            follow=[Next("backup-cluster", "take a base backup")],
        )
