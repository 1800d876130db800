"""Checks before anything is deleted by age: the clocks, and the share that an unattended run can delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from runbook import clock
from runbook.report import Report
from runbook.units import duration
from tasks.backups.retention import most_unattended
from tasks.host.clocks import Skew, read_skews
from tasks.stores.store import Store

T = TypeVar("T")


def judge_clocks(report: Report, env: Environment, *stores: Store, database: Postgres | None = None) -> None:
    """Compare this host's clock with those of the database, the stores and Prefect.

    Raises:
        RunbookFailed: one differs by more than a minute.
    """
    servers = [database] if database else env.nodes()
    skews = read_skews(servers, stores)
    over = [one for one in skews if one.is_over]
    report.require(
        "this host's clock",
        not over,
        "synchronise both clocks (chronyc tracking, timedatectl), then run this again. Nothing was deleted",
        value="; ".join(map(_described, over or [one for one in skews if one.ahead_seconds is not None]))
        or "no other clock to compare with",
        expected=f"within {clock.MOST_SKEW_SECONDS:.0f} s of the clocks of the database, the store and Prefect",
    )
    if missing := [one.of for one in skews if one.ahead_seconds is None]:
        report.fact("clocks that could not be read", ", ".join(missing))
    report.fail_if_critical()


def _described(skew: Skew) -> str:
    seconds = skew.ahead_seconds or 0.0
    apart = duration(abs(seconds))
    return f"ahead of {skew.of} by {apart}" if seconds >= 0 else f"behind {skew.of} by {apart}"


def limit_unattended(report: Report, env: Environment, what: str, doomed: Sequence[T], total: int) -> Sequence[T]:
    """The first of `doomed`: an unattended run deletes at most a share of `total` ([unattended_share]).

    A wrong rule or clock must not delete nearly everything in one night.
    """
    most = most_unattended(total, env.unattended_share)
    if not report.unattended or len(doomed) <= most:
        return doomed
    report.warn(
        "share that is deleted",
        "check the plan and run this with confirm to delete them all now. Otherwise the next run deletes more",
        value=f"{len(doomed)} of {total} {what} can be deleted; this run deletes {most}",
        expected=f"at most {env.unattended_share:.0%} in one unattended run (unattended_share)",
    )
    return doomed[:most]
