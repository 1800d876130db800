"""By how much to scale connections or processors (付録B)."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from runbook import metrics
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.page.form import Forms, read_forms
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.host.load import read_processors
from tasks.monitoring.history import history
from tasks.postgres.sessions.connections import SessionActivity, read_activity

if TYPE_CHECKING:
    from pandas import DataFrame

Part = Literal["connections", "cpu"]
METRIC: dict[Part, str] = {"connections": metrics.CONNECTIONS.name, "cpu": metrics.CPU.name}
TARGET_RATIO = 0.6
"""Use at the peak: below the table's 80 %, and enough for a peak that is a third higher."""
ROUND_TO = 10
BYTES_PER_CONNECTION = "about 10 MB"


@flow(name="advise-scaling", flow_run_name=RunName("advise-scaling {environment} {part}"))
def advise_scaling(
    environment: str, part: Part = "connections", days: Annotated[int, Field(ge=1, le=366)] = 7
) -> Report:
    """接続数・CPU使用率のスケールアップ (付録B)

    Calculates how many connections or processors are enough for the highest use of the last days, which watch-metrics
    recorded: the peak should use 60 %. Run it when the alarm of one of these metrics is active; its automation does.

    It changes nothing: more connections need a restart, more processors another machine. The report links the filled-in
    form. Evidence: the peak, its time, and the current use.

    Departs from the manual, which only says “scale up”: connections idle in a transaction are reported first.

    Args:
        environment: Environment (lab, staging, production …)
        part: Connections (connections) or CPU (cpu)
        days: Calculate from the maximum of this many past days
    """
    env = Environment.find(environment)
    with runbook("Advise scaling", env) as report:
        if part == "connections" and not env.has("postgres"):
            report.leave_out("postgres")
            report.outcome = "the environment has no PostgreSQL"
            return report
        try:
            found = history(env.reports_directory, METRIC[part], datetime.now(UTC) - timedelta(days=days))
        except OSError as error:
            raise OpsError(f"the history cannot be read: {error.strerror}", "correct reports/metrics' owner") from None
        forms = read_forms([env.name])
        _tell_peak(report, found, part, env.zone)
        if part == "connections":
            _advise_connections(report, env, forms, found)
        else:
            _advise_processors(report, env, forms, found)
    return report


def _tell_peak(report: Report, found: DataFrame, part: Part, zone: tzinfo) -> None:
    if found.empty:
        report.warn(
            "the history",
            "start python -m flows.monitoring.serve: it records a value each minute",
            value=f"no value of {METRIC[part]} is recorded: only the current one is known",
        )
        return
    peak = found.loc[found["most"].idxmax()]
    over = int((found["most"] > 0.8).sum())
    at = peak["at"].tz_convert(zone)
    report.fact("peak", f"{peak['most']:.0%} at {at:%Y-%m-%d %H:%M %z}; over 80 % in {over} of {len(found)} samples")


def _advise_connections(report: Report, env: Environment, forms: Forms, found: DataFrame) -> None:
    activity = read_activity(env.postgres)
    most = activity.limits.most
    used = max([activity.used_ratio, *found["most"]]) * most
    wanted = math.ceil(used / TARGET_RATIO / ROUND_TO) * ROUND_TO
    idle = _idle(report, activity)
    if wanted <= most:
        report.outcome = f"{most} connections are enough: at most {used:.0f} were used"
        return
    given = {"environment": env.name, "override": f"max_connections = {wanted}", "reason": f"peak of {used:.0f}"}
    report.fact("to raise it", forms.link("apply-postgres-settings", env.name, given))
    close = {"environment": env.name, "min_seconds": 300}
    if idle:
        report.fact("to free connections first", forms.link("close-idle-connections", env.name, close))
    report.warn(
        "max_connections",
        f"close sessions idle in a transaction, lower the pools, then raise it to {wanted}: on a standby first, "
        f"then here, each with a restart; a connection uses {BYTES_PER_CONNECTION} of memory",
        value=f"{most}, of which {used:.0f} were used",
        expected=f"{wanted}",
    )
    report.outcome = f"raise max_connections from {most} to {wanted}"


def _idle(report: Report, activity: SessionActivity) -> int:
    idle = [one for one in activity.clients if one.is_idle_in_transaction]
    rows = [
        ("in use", sum(not one.is_idle for one in activity.clients) - len(idle)),
        ("idle", sum(one.is_idle for one in activity.clients)),
        ("idle in a transaction", len(idle)),
    ]
    report.table("Connections now", ("state", "count"), rows)
    return len(idle)


def _advise_processors(report: Report, env: Environment, forms: Forms, found: DataFrame) -> None:
    now = read_processors(("", 0.0, 0.0))
    used = max([now.used_ratio, *found["most"]]) * now.count
    wanted = max(math.ceil(used / TARGET_RATIO), 1)
    report.fact("who uses them", forms.link("check-connections", env.name, {"environment": env.name}))
    if env.has("docker"):
        report.fact("containers", forms.link("check-docker-usage", env.name, {"environment": env.name}))
    if wanted <= now.count:
        report.outcome = f"{now.count} processors are enough: at most {used:.1f} were used"
        return
    given = {"environment": env.name, "samples": 10}
    if env.has("docker") or env.has("cloud"):
        report.fact("what they cost", forms.link("review-resources", env.name, given))
    report.warn(
        "processors",
        f"check first what uses them; then give this host {wanted}, or run a second backend",
        value=f"{now.count}, of which {used:.1f} were used",
        expected=f"{wanted}",
    )
    report.outcome = f"raise the processors of this host from {now.count} to {wanted}"
