"""Redis settings: check, apply, override for a time, undo (§2.3, §2.4)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.pinned import pin_redis
from flows.redis.settings import changes as choosing
from flows.redis.settings import findings, steps
from flows.setting_overrides import find_overrides, judge_overrides
from runbook.change import carrying_out
from runbook.flow import flow
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.redis.settings.recommended import RECOMMENDED, Name
from tasks.reports import setting_records as records

MOST_HOURS = 168


@flow(name="check-redis-settings", flow_run_name=RunName("check-redis-settings {environment}"))
def check_redis_settings(environment: str) -> Report:
    """永続化設定（RDB/AOF）・接続数制限設定の確認 (§2.3, §2.4)

    Compares the master's running settings and its configuration file with the manual's values for persistence and
    connections. It reports which changes take effect at once and which need a restart, what the next start would lose,
    temporary overrides on each server, and the replicas' settings. Run it daily, because it reports expired overrides,
    and after every change.

    It changes no server: a CONFIG SET that cannot succeed shows how a change takes effect. It closes the records of
    overrides whose value somebody replaced. Undo: nothing to undo. Evidence: the table of settings.

    Departs from the manual: running values are compared by effect: saving more often, more clients or a shorter timeout
    are accepted, and so is any file name. Since version 7 `appendonly.aof` is only the beginning of the files' names.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check Redis settings", env) as report:
        found, *others = findings.find_servers(report, env)
        overrides = find_overrides(env, found)
        findings.judge_role(report, found, Status.WARN)
        judge_overrides(
            report, found, overrides, apply=Next(findings.APPLY, findings.SET), undo=findings.UNDO, where=found.address
        )
        passed = [findings.judge_setting(report, env, found, one.name, overrides) for one in RECOMMENDED]
        findings.judge_file(report, found)
        findings.judge_replicas(report, env, others)
        findings.judge_rights(report, found)
        findings.report_settings(report, env, found, overrides)
        report.outcome = findings.outcome(overrides, sum(passed))
    return report


@flow(name="apply-redis-settings", flow_run_name=RunName("apply-redis-settings {environment} {names}"))
def apply_redis_settings(
    environment: str,
    names: tuple[Name, ...] = (),
    override: str = "",
    override_hours: Annotated[int, Field(ge=1, le=MOST_HOURS)] = 24,
    reason: str = "",
    everywhere: bool = False,
    master: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """永続化設定（RDB/AOF）・接続数制限設定の適用 (§2.3, §2.4)

    Fixes the findings of check-redis-settings by CONFIG SET and CONFIG REWRITE; or sets one value for a time
    (`override`, such as the manual's `maxmemory 2gb`). It undoes expired overrides. It keeps overrides in force and
    values that are accepted, unless `names` lists them. The same override again prolongs it. If it switches the AOF
    on, it waits until the AOF is complete before it writes the file.

    It never restarts the server, and reports settings that need a restart. CONFIG REWRITE also saves settings that
    others set at run time: the plan lists them, except passwords and ports. Undo: undo-redis-settings with the record,
    which is written before any change. Evidence: values before and after, running and in the file.

    Departs from the manual: editing redis.conf takes effect only after a restart, and CONFIG SET only until one. With
    `appendonly yes` only in the file, a restart would load a missing AOF: 0 keys.

    Args:
        environment: Environment (lab, staging, production …)
        names: Settings. Empty: all that are missing (a value that is at least the recommended one changes only if it is
            named here)
        override: Temporary settings (e.g. maxmemory 2gb). Empty: apply the manual's values. Not together with names
        override_hours: How long the temporary settings are valid, in hours
        reason: Reason for the temporary settings, for the record. May be empty
        everywhere: Also apply them to the reachable replicas. Off: replicas keep their values
        master: Only if no quorum of Sentinels names the master: host:port of the server that you verified as master.
            Usually empty
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Apply Redis settings", env, confirm, plan, changes=True) as report:
        choosing.require_sense(names, override)
        change = choosing.parse_override(override) if override else None
        servers = findings.find_servers(report, env, changes=True, waiver=master)
        findings.judge_role(report, servers[0], Status.CRITICAL)
        report.fail_if_critical()
        known = records.read_all(env.reports_directory)
        chosen = servers if everywhere else servers[:1]
        orders = [
            choosing.order_override(report, found, change, known)
            if change
            else choosing.order_manual(report, env, found, names, known)
            for found in chosen
        ]
        orders = [order for order in orders if not order.is_empty]
        if not orders:
            report.outcome = "there is nothing to change"
            return report
        steps.report_others(report, orders, [found for found in servers if found not in chosen])
        steps.judge_orders(report, orders)
        planned = [steps.plan_order(env, order, f"run it again, or {findings.UNDO}") for order in orders]
        with carrying_out(
            report,
            *(line for each in planned for line in each.lines),
            effect=steps.effect(orders, findings.UNDO),
            pins=[lambda report: pin_redis(report, env.redis.at(servers[0].address))],
        ) as carry:
            steps.keep(report, env, orders, hours=override_hours if override else 0, reason=reason)
            report.outcome = steps.outcome([steps.carry_out(carry, env, each, findings.APPLY) for each in planned])
    return report


@flow(name="undo-redis-settings", flow_run_name=RunName("undo-redis-settings {environment} {record}"))
def undo_redis_settings(
    environment: str, record: str = "", everywhere: bool = False, master: str = "", plan: str = "", confirm: str = ""
) -> Report:
    """永続化設定（RDB/AOF）・接続数制限設定の復元 (§2.3, §2.4)

    Restores the values that apply-redis-settings replaced, in the running server and in the file. Run it if a setting
    causes problems, or if an override is no longer needed.

    It keeps settings that somebody changed since, and names them. It never restarts the server. Undo:
    apply-redis-settings again. Evidence: values before and after, running and in the file.

    Departs from the manual: the manual does not undo an emergency's `maxmemory 2gb`.

    Args:
        environment: Environment (lab, staging, production …)
        record: Name of the record to undo. Empty: the newest of the current master
        everywhere: Also undo the newest record of the reachable replicas
        master: Only if no quorum of Sentinels names the master: host:port of the server that you verified as master.
            Usually empty
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Undo Redis settings", env, confirm, plan, changes=True) as report:
        servers = findings.find_servers(report, env, changes=True, waiver=master)
        findings.judge_role(report, servers[0], Status.CRITICAL)
        report.fail_if_critical()
        chosen = servers if everywhere or record else servers[:1]
        pairs = steps.find_undoable(env, records.read_all(env.reports_directory), chosen, record)
        report.fact("record", ", ".join(f"{kept.name} of {found.address}" for found, kept in pairs))
        if len(pairs) == 1:
            report.pin("record", pairs[0][1].name)
        undone = [choosing.order_undo(report, found, kept) for found, kept in pairs]
        if all(each.left and each.order.is_empty for each in undone):
            report.outcome = "there is nothing to undo"
            return report
        orders = [each.order for each in undone]
        steps.judge_orders(report, orders)
        planned = [steps.plan_undo(env, each) for each in undone]
        with carrying_out(
            report,
            *(line for each in planned for line in each.lines),
            effect=steps.effect(orders, findings.APPLY),
            pins=[lambda report: pin_redis(report, env.redis.at(servers[0].address))],
        ) as carry:
            results = [steps.undo(carry, env, each, lines) for each, lines in zip(undone, planned, strict=True)]
        report.outcome = steps.outcome(results, undone=True)
    return report
