"""How much load the system takes (§7.1)."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.monitoring.table import ALARMS
from runbook import metrics
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.metrics import CATALOGUE, Metric
from runbook.page.plots import Bar, Trace, bars, traces
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.health import wait_healthy
from tasks.faults.disposable import where_disposable
from tasks.load.driving import Driven, LoadRequest, drive_load, require_load
from tasks.load.names import limited
from tasks.load.results import COLUMNS, EndpointResult, Results, frame_of
from tasks.load.saturation import CLIENTS, CONNECTIONS, CPU, MEMORY, Saturation
from tasks.reports.frames import tables
from tasks.reports.past import filed

BEFORE_SECONDS, AFTER_SECONDS = 60.0, 120.0


@flow(name="run-performance-test", flow_run_name=RunName("run-performance-test {environment} {users}-users"))
def run_performance_test(
    environment: str,
    users: Annotated[int, Field(ge=1, le=500)] = 10,
    spawn_rate: Annotated[int, Field(ge=1, le=100)] = 5,
    seconds: Annotated[int, Field(ge=5, le=3600)] = 60,
    ai_answers: Annotated[int, Field(ge=0, le=10000)] = 50,
) -> Report:
    """パフォーマンステスト: 負荷試験 (§7.1)

    Simulates users who send the requests of `[application.load_test]` (Locust, in a separate process). Measures p50,
    p95, p99, errors and requests per second of each endpoint, and the use of processors, connections and Redis. A p95
    over 2 s is WARN, more than 5 % errors are CRITICAL (appendix B, or [thresholds]). An endpoint that became slower
    than in the last test with the same load is WARN. Run it every quarter, before a large release, and after a change
    of resources.

    It runs in a disposable environment only: the named one, or its drill_environment if the two share no server. Data
    that its requests write stays, with the text 負荷試験 (interview-ops). It holds the environment's lock. With real AI
    providers each answer costs tokens. Undo: none. Evidence: endpoints.csv and Locust's files, in the report folder
    under load/.

    Args:
        environment: Environment. If it is not disposable, the test runs in its drill_environment
        users: Simultaneous users
        spawn_rate: Users added per second
        seconds: Duration, in seconds
        ai_answers: Most AI answers to request (a real provider charges for them)
    """
    env = Environment.find(environment)
    target, refusal = _target(env)
    with runbook("Run performance test", target, changes=True) as report:
        if refusal:
            raise refusal
        if target.name != env.name:
            report.fact("asked for", f"{env.name}: this is its drill_environment")
        _run(report, target, LoadRequest(users, spawn_rate, seconds, ai_answers))
    return report


def _target(env: Environment) -> tuple[Environment, OpsError | None]:
    """The environment that gets the load, and an error if it must not."""
    try:
        target = where_disposable(env)
    except OpsError as error:
        return env, error
    if target.disposable:
        return target, None
    hint = "name a disposable environment as drill_environment in its TOML, or launch this there"
    if target is env:
        return env, OpsError(f"{env.name} is not disposable: it gets no load", hint)
    return env, OpsError(f"{target.name}, the drill_environment of {env.name}, is not disposable", hint)


def _run(report: Report, env: Environment, load: LoadRequest) -> None:
    require_load(env.application)
    report.fact(FACT, load.told)
    wait_healthy(env.application, seconds=BEFORE_SECONDS)
    directory = env.reports_directory / "load" / f"{report.started:%Y%m%dT%H%M%S}"
    report.fact("evidence", directory)
    taken = Saturation(env)
    driven = drive_load(env.application, load, directory, taken.sample)
    report_results(report, env, load, driven, taken)
    health = wait_healthy(env.application, seconds=AFTER_SECONDS)
    if health.configured:
        report.passed("healthy after it", value=health.answer)
    else:
        report.fact("health", health.answer)


RUNBOOK, TABLE, FACT = "run-performance-test", "Endpoints", "load"
SATURABLE = (CPU, CONNECTIONS, CLIENTS, MEMORY)
HINTS = {
    CPU: "scale up: add or replace processors, or add workers on another host",
    CONNECTIONS: "run check-connections for the clients, and check-pool-settings for the pool's limits",
    CLIENTS: "run check-redis-clients for the clients",
    MEMORY: "run check-redis-memory for the largest prefixes, then clear-cache",
}
GENERATOR = 0.9
SLOWER, SLOWER_SECONDS = 1.25, 0.1
MOST = 12


def report_results(report: Report, env: Environment, load: LoadRequest, driven: Driven, taken: Saturation) -> None:
    """Everything about one test."""
    found = driven.results
    rows = [one.row for one in (*found.endpoints, found.whole)]
    report.table(TABLE, COLUMNS, rows, csv=frame_of(found).to_csv(index=False))
    drawn = [
        Bar(one.name, (one.p95,), f"p50 {one.p50:.2f} · p95 {one.p95:.2f} · p99 {one.p99:.2f} s")
        for one in (*found.endpoints, found.whole)
    ]
    report.attach(Evidence("p95 by endpoint", svg=bars(drawn, "s")))
    if found.failures:
        report.table("Failed requests (they may lack the last second)", ("endpoint", "error", "times"), found.failures)
    for one in found.endpoints:
        _judge_endpoint(report, env, one)
    hint = "see the endpoints' findings: this load is more than the system can handle"
    _judge_errors(report, env, "errors of all requests", found.whole, hint)
    _judge_coverage(report, env, load, found)
    _judge_saturation(report, env, taken)
    report.prefer(
        "the generator was not the limit",
        driven.generator <= GENERATOR,
        "use fewer users, or run Locust on another host: its own processor was the limit",
        value=f"{driven.generator:.0%} of a processor",
        expected=f"at most {GENERATOR:.0%}",
    )
    _compare(report, env, load, found)
    whole = found.whole
    report.outcome = (
        f"{whole.requests:,} requests, {whole.per_second:.1f}/s, p95 {whole.p95:.2f} s, {whole.error_ratio:.1%} failed"
    )


def _limit(env: Environment, metric: Metric) -> float:
    """The alarm of 付録B, or the first of the metric's two limits."""
    return ALARMS[metric.name].limit(env.limits) if metric.name in ALARMS else env.limits[metric.name][0]


def _judge_endpoint(report: Report, env: Environment, one: EndpointResult) -> None:
    most = _limit(env, metrics.API_RESPONSE)
    report.prefer(
        f"{one.name}: response time",
        one.p95 <= most,
        "check the saturation table, review-performance (slow statements) and check-ai-providers",
        value=f"p95 {one.p95:.2f} s, p99 {one.p99:.2f} s",
        expected=f"p95 at most {most:g} s",
    )
    hint = "run search-logs with level ERROR for these minutes; if only AI answers fail, check-ai-providers"
    _judge_errors(report, env, f"{one.name}: errors", one, hint)


def _judge_errors(report: Report, env: Environment, name: str, one: EndpointResult, hint: str) -> None:
    ratio = _limit(env, metrics.API_ERRORS)
    value, expected = f"{one.error_ratio:.1%} of {one.requests}", f"at most {ratio:.0%}"
    report.require(name, one.error_ratio <= ratio, hint, value=value, expected=expected)


def _judge_coverage(report: Report, env: Environment, load: LoadRequest, found: Results) -> None:
    """Endpoints without a request, and AI answers that were not requested."""
    steps = env.application.load_test
    missing = [one.title for one in steps if not found.of(one.title) and (not one.ai or load.ai_answers)]
    report.prefer(
        "every endpoint was measured",
        not missing,
        "run it longer, or with more users",
        value=f"not measured: {', '.join(missing)}" if missing else "yes",
    )
    if not load.ai_answers and any(one.ai for one in steps):
        report.warn("AI answers", "set ai_answers: each one costs tokens", value="not measured: ai_answers is 0")
    if refused := sum(seen.requests for one in steps if one.ai and (seen := found.of(limited(one.title)))):
        report.warn(
            "AI answers were refused by the limit per user",
            "raise the application's limit in this environment, or lower ai_answers",
            value=f"{refused} times",
        )


def _judge_saturation(report: Report, env: Environment, taken: Saturation) -> None:
    import pandas as pd

    rows, drawn = list[tuple[str, ...]](), list[Trace]()
    for metric in SATURABLE:
        most, unit = _limit(env, CATALOGUE[metric]), CATALOGUE[metric].unit
        samples = taken.samples.get(metric, [])
        if not samples:
            why = taken.missing.get(metric, "the test was too short for a second sample")
            report.warn(metric, "measure it on its host during the next test", value=f"not measured: {why}")
            continue
        values = pd.Series(dict(samples))
        mean, top = float(values.mean()), float(values.max())
        rows.append((metric, str(len(values)), f"{mean:.1%}", f"{top:.1%}", f"{most:.0%}"))
        drawn.append(Trace(metric, samples, f"max. {top:.0%}", unit, most))
        report.prefer(metric, top <= most, HINTS[metric], value=f"at most {top:.0%}", expected=f"at most {most:.0%}")
        if problem := taken.missing.get(metric):
            report.warn(f"{metric} during the test", "see the server's log: some queries failed", value=problem)
    report.table("Saturation during the test", ("metric", "samples", "mean", "most", "saturated above"), rows)
    if drawn:
        picture = traces(drawn, env.zone)
        report.attach(Evidence("Saturation from the test's beginning to its end (dashed: the limit)", svg=picture))


def _compare(report: Report, env: Environment, load: LoadRequest, found: Results) -> None:
    """With the earlier tests. Only a test with the same load can show that the system became slower."""
    reports = filed(env.reports_directory, env.name, RUNBOOK)
    past = tables(islice((one for one in reports if one.rows(TABLE)), MOST), TABLE, facts=(FACT,))
    if past.empty:
        report.fact("compared with", "there is no earlier test")
        return
    past["p95 s"] = past["p95 s"].astype(float)
    wholes = past[past["endpoint"] == found.whole.name]
    columns = ["began", "status", FACT, *COLUMNS[1:]]
    rows = wholes.assign(began=wholes["began"].dt.strftime("%Y-%m-%d %H:%M"))[columns].iloc[::-1]
    report.table("Earlier tests", columns, rows.to_numpy().tolist(), csv=past.to_csv(index=False))
    points = [*zip(wholes["began"], wholes["p95 s"], strict=True), (report.started, found.whole.p95)]
    picture = traces([Trace("p95 of all requests", points, f"{found.whole.p95:.3f} s", "s")], env.zone)
    report.attach(Evidence("p95 of all requests, test by test", svg=picture))
    same = past[(past["load"] == load.told) & (past["status"] != "CRITICAL")]
    if same.empty:
        report.fact("compared with", "no earlier good test had this load")
        return
    last = same[same["began"] == same["began"].max()].set_index("endpoint")["p95 s"]
    report.fact("compared with", f"{same['began'].max():%Y-%m-%d %H:%M} ({same['report'].iloc[-1]})")
    now = frame_of(found).set_index("endpoint")["p95 s"].reindex(last.index)
    slower = now[(now > last * SLOWER) & (now - last > SLOWER_SECONDS)]
    report.prefer(
        "as fast as the last test",
        slower.empty,
        "check what changed since: a release, settings, data, the host",
        value="; ".join(f"{name}: p95 {last[name]:.3f} → {p95:.3f} s" for name, p95 in slower.items()) or "yes",
        expected=f"at most {SLOWER - 1:.0%} slower",
    )
