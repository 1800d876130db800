"""Certificates issued and renewed by certbot (§4.3), and proven where they are served."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from prefect import flow

from blocks.environment import Environment
from blocks.places import Certificates
from flows.infrastructure.certificates.findings import judge_schedules, tell_certificates
from flows.infrastructure.certificates.steps import Work, do, find_work, read_all, read_known, shown_for
from flows.pinned import pin_paths
from runbook.errors import OpsError
from runbook.report import Report
from runbook.run import runbook
from tasks.certificates import certbot
from tasks.certificates.files import CHAIN, Files
from tasks.certificates.served import Served


@flow(name="renew-certificates", flow_run_name="renew-certificates {environment}")
def renew_certificates(
    environment: str, domain: str = "", force: bool = False, plan: str = "", confirm: str = ""
) -> Report:
    """SSL証明書管理: Let's Encrypt証明書の取得・更新 (§4.3)

    Has certbot issue the certificates of `[certificates]` that are missing or lack a name, and renew those in the last
    third of their life (30 of 90 days), one by one; its deploy hook reloads the web server; then the new one must be
    in the file, whole and with its key, and the server must show it. One that was renewed before and is not yet served
    is loaded. Where nothing is due nothing is done. Every night at 00:00; unattended where the environment's TOML
    names it under `unattended`.

    When an authority refuses, the old certificate stays where it is and is served on; the report says which challenge
    failed. certbot keeps what it replaces in its archive directory. A renewal is undone by the one before from there.

    Departs from the manual: it runs once, here, and not from cron beside the package's own timer (other schedules are
    told); challenges are answered by the web server itself (webroot), since --standalone wants the port that it holds,
    or by DNS (`challenge`); `renew_command` replaces certbot. A file renewed is not yet a certificate served.

    Args:
        environment: 対象の環境
        domain: この証明書だけ (ディレクトリ名)。空ならすべて
        force: 期限前でも更新する (鍵の漏洩など)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Renew certificates", env, confirm, plan, changes=True) as report:
        block, now = env.certificates, datetime.now(UTC)
        every, served = read_all(block)
        chosen = _chosen(every, domain)
        found = [find_work(files, shown_for(files, every, served), force, now) for files in chosen]
        due = [work for work in found if work]
        _tell_unreadable(report, chosen)
        judge_schedules(report)
        tell_certificates(report, every, served, now)
        if not due:
            _tell_unasked(report, chosen, [shown_for(files, every, served) for files in chosen])
            report.outcome = f"nothing is due of {len(chosen)} certificates"
            return report
        known = read_known(report, block)
        _plan(report, block, due)
        pin_paths(report, "certificates", *(work.files.directory / CHAIN for work in due))
        permit = report.permit(*(work.act for work in due))
        done = [do(report, permit, block, work, known) for work in due]
        report.outcome = f"{sum(done)} of {len(due)} done"
    return report


def _chosen(every: Sequence[Files], domain: str) -> Sequence[Files]:
    names = [files.name for files in every]
    if not names:
        raise OpsError("[certificates] names no domain", "add domains to the environment's TOML")
    if domain and domain not in names:
        raise OpsError(
            f"there is no certificate “{domain[:60]}”", f"choose one of {', '.join(names)}, or leave it empty"
        )
    return [files for files in every if domain in ("", files.name)]


def _tell_unreadable(report: Report, chosen: Sequence[Files]) -> None:
    """They are left alone, and keep no other from being renewed."""
    for files in chosen:
        if not files.chain and not files.missing:
            report.warn(f"{files.name}: left alone", files.trouble[1], value=files.trouble[0])


def _tell_unasked(report: Report, chosen: Sequence[Files], shown: Sequence[Sequence[Served]]) -> None:
    """A certificate that a killed run renewed, or whose hook failed, may never have been loaded."""
    for files, servers in zip(chosen, shown, strict=True):
        if files.chain and not any(one.server.protocol == "https" for one in servers):
            report.warn(
                f"{files.name}: served",
                f"add “{files.name}:443” to [certificates] served",
                value="no web server is asked for it: whether the one in the file is loaded is not known",
            )


def _plan(report: Report, block: Certificates, due: Sequence[Work]) -> None:
    """What would be run; certbot is asked for only where it is needed."""
    for work in due:
        line = shlex.join(certbot.command(block, work.kind, work.files.names))
        report.plan(f"{work.kind} {work.files.name}", f"{work.why}: {line}")
    if all(work.kind == certbot.RELOAD for work in due) or block.renew_command:
        return
    if block.challenge == "standalone":
        problem = certbot.read_port_problem(block.standalone_port)
        report.require(
            "port for standalone",
            not problem,
            "stop what listens there, or use webroot or dns-01",
            value=problem or f"{block.standalone_port} is free",
        )
    try:
        report.fact("certbot", certbot.read_version())
    except OpsError as error:
        report.fail("certbot", error.hint, value=error.message)
