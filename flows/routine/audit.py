"""Evidence for the security audit, in one archive (§7.1)."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.routine.sources.evidence import EvidenceSource
from runbook import clock
from runbook.errors import OpsError
from runbook.files.chain import verify_chain
from runbook.flow import flow
from runbook.page.render import key
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.application.versions import read_versions
from tasks.host.service_accounts import read_accounts
from tasks.logs.figures.users import read_users
from tasks.postgres.server.access import read_access as read_postgres
from tasks.redis.access import read_access as read_redis
from tasks.reports.evidence import holding, seal, secrets_of, verify_sealed
from tasks.reports.past import filed


@flow(name="collect-audit-evidence", flow_run_name=RunName("collect-audit-evidence {environment} {days}d"))
def collect_audit_evidence(environment: str, days: Annotated[int, Field(ge=1, le=3660)] = 365) -> Report:
    """セキュリティ監査: 証跡の収集 (§7.1)

    Puts the evidence for an auditor into one archive (tar.gz). Its manifest has the SHA-256 of each file.

    Verifies the chain of reports: an edited or removed report is CRITICAL. Collects for the last `days`: the index of
    all reports; the complete reports of drills, verifications and checklists; access rights (database roles and
    pg_hba.conf, Redis ACL users, users of services, the application's users from the audit log); versions; settings.
    Run it yearly, before the checklist security_audit.

    It only writes the archive, below evidence/ in the report folder, readable by the owner's group. It contains no
    password and no password hash. A file with a secret of this environment is left out, and is CRITICAL. A source that
    does not answer is "not measured". Evidence: the archive, and its SHA-256 in the report.

    Args:
        environment: Environment (lab, staging, production …)
        days: Days to include
    """
    env = Environment.find(environment)
    with runbook("Collect audit evidence", env) as report:
        evidence = EvidenceSource(report, secrets_of(env.whole().values()))
        collect(report, env, evidence, report.started - timedelta(days=days))
        leaking = holding(evidence.files, evidence.secrets)
        for name in leaking:
            del evidence.files[name]
        told = f"left out: {', '.join(leaking)}" if leaking else f"{len(evidence.secrets)} checked"
        report.require(
            "no secret is in the archive", not leaking, "change this secret: it was found in the evidence", value=told
        )
        path = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}-{key(report)}-{env.name}.tar.gz"
        about = {"environment": env.name, "collected": report.started_at, "days": days, "missing": evidence.missing}
        sealed = seal(path, evidence.files, about, report.started)
        wrong = verify_sealed.after(sealed)(path)
        report.require("the archive matches its manifest", not wrong, "collect it again", value="; ".join(wrong[:5]))
        report.fact("archive", f"{path}, {size(sealed.bytes)}, {sealed.files} files")
        report.fact("SHA-256 of the archive", sealed.sha256)
        evidence.report_missing()
        report.outcome = f"{sealed.files} files of evidence, {len(evidence.missing)} sources not measured"
    return report


DRILL = "dr-drill"
WHOLE = (f"-{DRILL}", "-verify-backup", "-run-checklist")
"""Reports that are collected completely."""
SHOWN = 50


def collect(report: Report, env: Environment, evidence: EvidenceSource, since: datetime) -> None:
    """Collect all files into `evidence`, and findings into `report`."""
    _reports(report, evidence, env, since)
    if env.drill_environment:
        other = evidence.ask("drills elsewhere", lambda: Environment.find(env.drill_environment))
        if other:
            evidence.secrets = [*evidence.secrets, *secrets_of(other.whole().values())]
            _reports(report, evidence, other, since)
    if not (env.has("disposable") or env.drill_environment):
        report.leave_out("drill_environment")
    elif not any(name.endswith(f"-{DRILL}.json") for name in evidence.files):
        evidence.lacks("drills", "there is no report of a drill in that time: launch run-drill")
    _services(report, evidence, env)
    for part, gather in (("postgres", _postgres), ("redis", _redis), ("logs", partial(_users, since=since))):
        if env.has(part):
            gather(report, evidence, env)
        else:
            report.leave_out(part)
    _versions(report, evidence, env)
    evidence.add("settings/environment.json", _described(env))


def _reports(report: Report, evidence: EvidenceSource, env: Environment, since: datetime) -> None:
    """The chain, the index, and the complete reports."""
    name = f"chain of reports ({env.name})"
    if not env.reports_directory.is_dir():
        evidence.lacks(name, f"there are none in {env.reports_directory} on this host")
        return
    problems = evidence.ask(name, lambda: _broken(env.reports_directory))
    if problems is None:
        return
    report.require(
        name,
        not problems,
        "compare with the reports in Prefect, which have the original hashes, and find out who changed them",
        value="; ".join(problems[:5]) or "whole",
    )
    found = list(filed(env.reports_directory, env.name, since=since))
    index = [
        {
            "file": one.path.name,
            "runbook": one.runbook,
            "status": one.status,
            "started": one.started,
            "hash": one.content.get("hash"),
            "losses": [loss.detail for loss in one.losses],
        }
        for one in found
    ]
    evidence.add(f"reports/{env.name}/index.json", {"problems": problems, "reports": index})
    for one in found:
        if one.path.stem.endswith(WHOLE):
            evidence.add(f"reports/{env.name}/{one.path.name}", one.content)
    critical = sum(one.status == Status.CRITICAL for one in found)
    report.fact(f"reports ({env.name})", f"{len(found):,}, {critical:,} of them CRITICAL")
    recovered = [(clock.text(one.started, "minutes"), one.status, one.runbook, one.lost) for one in found if one.losses]
    report.table(f"Recoveries ({env.name})", ("began", "status", "runbook", "lost"), recovered)
    drills = [
        (f"{one.started:%Y-%m-%d %H:%M}", one.status, one.facts.get("scenario", ""))
        for one in found
        if one.path.stem.endswith(f"-{DRILL}")
    ]
    report.table(f"Drills ({env.name})", ("began", "status", "scenario"), drills)


def _broken(directory: Path) -> list[str]:
    try:
        return verify_chain(directory)
    except OSError as error:
        raise OpsError(f"the chain cannot be read: {error.strerror}", "correct the owner of the reports") from None


def _postgres(report: Report, evidence: EvidenceSource, env: Environment) -> None:
    found = evidence.ask("access to the database", lambda: read_postgres(env.postgres))
    if found is None:
        return
    if not found.rules:
        evidence.lacks("pg_hba.conf", f"{env.postgres.admin_user} has no permission to read it")
    evidence.add("access/postgres.json", {"roles": found.roles, "rights": found.rights, "rules": found.rules})
    evidence.add("settings/postgres.json", found.settings)
    report.table(
        "Database roles",
        ("role", "attributes", "member of", "password"),
        [
            (role.name, ", ".join(role.attributes), ", ".join(role.of), _yes(role.has_password))
            for role in found.roles[:SHOWN]
        ],
    )
    masters = [role.name for role in found.roles if {"superuser", "login"} <= set(role.attributes)]
    others = [name for name in masters if name != env.postgres.admin_user]
    report.prefer(
        "superusers of the database",
        not others,
        "run ALTER ROLE … NOSUPERUSER for roles that do not need it",
        value=", ".join(masters),
        expected=env.postgres.admin_user,
    )


def _yes(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "none"


def _redis(report: Report, evidence: EvidenceSource, env: Environment) -> None:
    found = evidence.ask("access to Redis", lambda: read_redis(env.redis))
    if found is None:
        return
    evidence.add("access/redis.json", found.users)
    evidence.add("settings/redis.json", found.settings)
    report.table(
        "Redis users",
        ("user", "flags", "passwords", "commands", "keys"),
        [(user.name, ", ".join(user.flags), user.passwords, user.commands, user.keys) for user in found.users[:SHOWN]],
    )
    unlocked = [user.name for user in found.users if user.open]
    report.prefer(
        "Redis users without a password",
        not unlocked,
        "set a password: ACL SETUSER … >password, or requirepass",
        value=", ".join(unlocked) or "none",
        expected="none",
    )


def _services(report: Report, evidence: EvidenceSource, env: Environment) -> None:
    accounts = read_accounts(env.services, list(env.services.names))
    for one in accounts:
        if not one.user:
            evidence.lacks(f"user of {one.role}", one.problem)
    if not accounts:
        report.leave_out("services")
    evidence.add("access/services.json", accounts)
    report.table(
        "Users of services",
        ("service", "user"),
        [(f"{one.role} ({one.service})", one.user or "not measured") for one in accounts],
    )
    roots = [one.role for one in accounts if one.is_root]
    report.prefer(
        "services that run as root",
        not roots,
        "give each service its own user: User= in its unit",
        value=", ".join(roots) or "none",
        expected="none",
    )


def _users(report: Report, evidence: EvidenceSource, env: Environment, *, since: datetime) -> None:
    found = evidence.ask("users of the application", lambda: read_users(env.logs, env.zone, since))
    if found is None:
        return
    evidence.add("access/application_users.json", found.users)
    report.table(
        "Users of the application, latest first",
        ("user", "events", "failed", "addresses", "last"),
        [
            (evidence.shown(user.who), user.events, user.failed, user.addresses, f"{user.last:%Y-%m-%d %H:%M}")
            for user in found.users[:SHOWN]
        ],
    )
    report.fact("users of the application", f"{len(found.users):,} in the audit log")
    if found.bad:
        evidence.lacks("lines of the audit log", f"{found.bad:,} are not JSON")
    if found.undated:
        evidence.lacks("lines of the audit log", f"{found.undated:,} have no readable time")
    if found.unreadable:
        evidence.lacks("files of the audit log", f"could not be read: {', '.join(found.unreadable)}")


def _versions(report: Report, evidence: EvidenceSource, env: Environment) -> None:
    versions = read_versions(env)
    for one in versions:
        if not one.version:
            evidence.lacks(f"version of {one.product} ({one.where})", one.problem)
    evidence.add("versions.json", versions)
    report.table(
        "Versions",
        ("what", "where", "version"),
        [(one.product, one.where, one.version or "not measured") for one in versions],
    )


def _described(env: Environment) -> dict[str, object]:
    """The environment's blocks; they mask their secrets."""
    parts = {part: block.model_dump(mode="json") for part, block in env.whole().items()}
    return {"environment": env.model_dump(mode="json"), "parts": parts}
