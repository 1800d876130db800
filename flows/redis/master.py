"""Which server is the master, and who says so: judged in one way by every flow that reads or changes it (§8.3)."""

from __future__ import annotations

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.redis.sentinels import Watch, master_by

VOUCHED = "the Sentinels vouch for the master"


def judge_master(report: Report, block: Redis, watch: Watch, *, changes: bool, waiver: str | None = "") -> Redis:
    """The server that a run is about: the one that the Sentinels name, the configured one where there are none.

    Where too few of them name it, it may be one that was replaced long ago: a run that only reads says so and goes on,
    one that `changes` something is refused. `waiver` (`host:port`) is an operator's word for that very server,
    None where a flow takes no such word.

    Raises:
        OpsError: they name different ones, or the waiver names another.
    """
    server = master_by(block, watch)
    if waiver and waiver != server.address:
        raise OpsError(
            f"master is {waiver}, and the server would be {server.address}",
            "correct the parameter master, or host and port in [redis], and register the blocks again",
        )
    doubt = watch.doubt(server.address)
    if not doubt:
        return server
    hint = "start the Sentinels, name all of them in [redis] sentinels, correct sentinel_master and sentinel_password"
    if waiver:
        doubt += f"; taken all the same, by the operator's word (master={waiver})"
    elif changes and waiver is not None:
        hint += f"; if you know that {server.address} is the master: launch it with master={server.address}"
    otherwise = Status.CRITICAL if changes and not waiver else Status.WARN
    report.fail(VOUCHED, hint, value=doubt, expected="a majority names it", worst=otherwise)
    return server


def judge_same_master(report: Report, address: str, watch: Watch) -> None:
    """At the end of a report: whether what it tells of is still the master."""
    others = sorted(master for master in watch.masters if master not in ("", address))
    if others:
        hint = "launch it again: this report is of the former master"
        report.warn("the master changed during this report", hint, value=", ".join(others), expected=address)
