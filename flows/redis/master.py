"""The master that a flow reads or changes, and whether enough Sentinels name it (§8.3)."""

from __future__ import annotations

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.redis.sentinels import Watch, master_by

VOUCHED = "the Sentinels vouch for the master"


def judge_master(report: Report, block: Redis, watch: Watch, *, changes: bool, waiver: str | None = "") -> Redis:
    """The master that the Sentinels name; without Sentinels the configured server.

    If too few Sentinels name it, it may have been replaced long ago: a run that only reads warns, a run that `changes`
    something is refused. `waiver` (`host:port`): the operator confirms that server; None: the flow has no such
    parameter.

    Raises:
        OpsError: they name different masters, or the waiver names another server.
    """
    server = master_by(block, watch)
    if waiver and waiver != server.address:
        raise OpsError(
            f"the parameter master is {waiver}, but the server is {server.address}",
            "correct the parameter master, or host and port in [redis], and register the blocks again",
        )
    doubt = watch.doubt(server.address)
    if not doubt:
        return server
    hint = "start the Sentinels, name all of them in [redis] sentinels, correct sentinel_master and sentinel_password"
    if waiver:
        doubt += f"; the operator confirmed it (master={waiver})"
    elif changes and waiver is not None:
        hint += f"; if you know that {server.address} is the master: run it with master={server.address}"
    worst = Status.CRITICAL if changes and not waiver else Status.WARN
    report.fail(VOUCHED, hint, value=doubt, expected="a majority names it", worst=worst)
    return server


def judge_same_master(report: Report, address: str, watch: Watch) -> None:
    """The server of this report is still the master at its end."""
    others = sorted(master for master in watch.masters if master not in ("", address))
    if others:
        hint = "run it again: this report is about the former master"
        report.warn("the master changed during this report", hint, value=", ".join(others), expected=address)
