"""What a PostgreSQL failover tells afterwards (§8.3): the phases, what is lost and how that is known, what is left."""

from __future__ import annotations

from blocks.environment import Environment
from flows.recovery.postgres.findings import is_synchronous
from flows.recovery.postgres.pair import Pair
from flows.recovery.postgres.rejoin import join_there
from flows.recovery.postgres.steps import Done, Phases
from runbook.report import Report
from runbook.units import size
from tasks.failover.ledger import Account
from tasks.failover.member import read_member
from tasks.failover.segments import Beyond
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address, read_synchrony
from tasks.wal.format.names import lsn_text

_WHAT = {
    "decision": "the run's start, until the confirmed plan was judged again",
    "fencing": "the old primary stopped and proven to be",
    "replay of the tail": "everything that was received anywhere, replayed",
    "promote": "pg_promote, until it returned",
    "first acknowledged write": "from pg_promote's call until a client's commit was acknowledged",
    "application": "its connection string, its restart, until healthy",
    "rejoin": "the old primary, until it streams",
}


def tell_phases(report: Report, phases: Phases) -> None:
    """Seconds of each, apart."""
    found = {name: phases.seconds[name] for name in _WHAT if name in phases.seconds}
    report.table(
        "Phases",
        ("phase", "seconds", "what"),
        [(name, f"{seconds:.3f}", _WHAT[name]) for name, seconds in found.items()],
    )
    for name, seconds in found.items():
        report.fact(name, f"{seconds:.3f} s")


def tell_done(report: Report, pair: Pair, done: Done, attested: str) -> None:
    """Fence, tail and promotion: the evidence; `attested` by whom, where not all of the fence is proven."""
    fencing = done.promoted.fencing
    unproven = f"attested by {attested}" if attested and fencing.unknown else "not known"
    report.table(
        f"Fence of {fencing.server}, looked at last before pg_promote",
        ("what", "holds", "seen"),
        [(row.what, "proven" if row.holds else unproven, row.seen) for row in (*fencing.rows, done.kept_down)],
    )
    report.table(
        "Received WAL, all of it replayed",
        ("where", "directory", "beyond what was replayed"),
        [(source.name, source.directory, source.problem or size(source.beyond.bytes)) for source in done.fed.sources],
    )
    report.fact(
        "promoted",
        f"{address(pair.new)} at {lsn_text(done.promoted.switched_at)}, now on timeline {done.promoted.timeline}",
    )


def tell_loss(report: Report, pair: Pair, done: Done, left: Beyond | None, account: Account) -> None:
    """Bytes and transactions by the old primary's own WAL, where it can be read; else what the mode of replication
    says. `left`: what that WAL has after the new timeline's beginning."""
    _tell_ledger(report, pair, account)
    if left is not None and not left.commits:
        more = f" ({left.bytes:,} bytes of no committed transaction)" if left.bytes else ""
        report.fact("acknowledged writes lost", f"0 (proven: the old primary's WAL has no commit beyond{more})")
        return
    unread = any(source.problem for source in done.fed.sources)
    by_mode = is_synchronous(pair) and not account.missing and not unread
    told = f"{left.commits:,} transactions ({left.bytes:,} bytes) are only in the old primary's WAL" if left else ""
    if by_mode:
        why = f"0, by synchronous replication ({pair.sync_names}): all that its members have was replayed"
        report.fact("acknowledged writes lost", why)
        if told:
            report.fact("never acknowledged", f"{told}: their clients still waited, unless they cancelled the wait")
        return
    hint = "rejoin-standby saves that WAL; compare with the application's own records of the time before the failure"
    if left is None:
        hint = "compare with the application's own records of the time before the failure"
    report.warn(
        "acknowledged writes lost",
        hint,
        value=told or "not known: its WAL cannot be read, and the mode of replication does not exclude it",
        expected="0",
    )
    report.fact("acknowledged writes lost", f"at most {left.commits:,} transactions" if left else "not known")


def _tell_ledger(report: Report, pair: Pair, account: Account) -> None:
    new = address(pair.new)
    servers = dict.fromkeys([address(pair.old), new, *(entry.server for entry in account.entries)])
    rows = []
    for server in servers:
        found = account.on(server)
        lost = sum(entry.number in account.missing for entry in found)
        rows.append((server, len(found), found[-1].number if found else "", len(found) - lost))
    report.table(
        "Acknowledged writes of this run's own client",
        ("acknowledged by", "writes", "last number", f"there on {new}"),
        rows,
    )
    report.require(
        "this run's own acknowledged writes",
        not account.missing,
        "the application's are lost in proportion: compare with its own records",
        value=f"{len(account.entries) - len(account.missing):,} of {len(account.entries):,} are there; "
        f"{account.indeterminate} were not answered",
        expected="all that were acknowledged",
    )


def tell_after(report: Report, env: Environment, pair: Pair, *, rejoined: bool) -> None:
    """One primary; what protects it now; and what is to be done next."""
    new, old = read_member(pair.new), read_member(pair.old)
    report.require(
        "one primary",
        new.is_primary and not old.is_primary,
        f"stop the service {pair.old.service} now: until then two servers take writes",
        value=", ".join(one.address for one in (new, old) if one.is_primary) or "none",
        expected=new.address,
    )
    sync = read_synchrony(pair.new)
    told = f"wait for {sync.needed} of {', '.join(sync.connected)}" if sync.needed else "wait for nobody"
    report.fact("commits on the new primary", told)
    if not rejoined:
        where = "" if is_here(pair.old.host) else f" ({join_there(env, pair.old)})"
        report.warn(
            "standby",
            f"find out why it died, then launch rejoin-standby{where}: until then there is none",
            value=f"{old.address} is not joined again",
        )
    if env.has("wal"):
        report.warn(
            "base backup",
            "launch backup-cluster: a recovery to a point on the new timeline begins with the "
            "old one's backup until then",
            value=f"none of timeline {new.timeline} yet",
        )
