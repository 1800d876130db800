"""Issue and renew certificates with certbot, and prove that they are served (§4.3)."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import Environment
from blocks.places import Certificates
from blocks.tls import TlsServer
from flows.infrastructure.certificates.check import read_all, read_known
from flows.infrastructure.certificates.findings import (
    attach_certificates,
    in_days,
    judge_files,
    judge_schedules,
    same_as_file,
)
from flows.pinned import pin_paths
from runbook import clock
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import first_of
from tasks.certificates import certbot
from tasks.certificates.certbot import ISSUE, RELOAD, RENEW, Kind
from tasks.certificates.certificate import Certificate
from tasks.certificates.files import CHAIN, Files, file_of, read_files
from tasks.certificates.served import Served, wait_until_served


@flow(name="renew-certificates", flow_run_name=RunName("renew-certificates {environment} {domain}"))
def renew_certificates(
    environment: str, domain: str = "", force: bool = False, plan: str = "", confirm: str = ""
) -> Report:
    """SSL証明書管理: Let's Encrypt証明書の取得・更新 (§4.3)

    Runs certbot for the certificates of `[certificates]`, one by one. It issues those that are missing or lack a name,
    and renews those in the last third of their lifetime (30 of 90 days). certbot's deploy hook reloads the web server.
    Then the file must have the new certificate with its key, and the server must present it. A renewed certificate that
    is not yet served is loaded by a reload. If nothing is due, nothing is done. Run it every night at 00:00; it is
    unattended if the environment's TOML lists it under `unattended`.

    If the authority refuses, the old certificate stays in use; the report names the failed challenge. To undo a
    renewal: certbot keeps the replaced files in its archive directory.

    Departs from the manual: it has one schedule, not cron in addition to the package's timer (other schedules are
    reported). The web server (webroot) or DNS (`challenge`) answers challenges, because --standalone needs the web
    server's port. `renew_command` replaces certbot. A renewed file is not proof that it is served.

    Args:
        environment: Environment (lab, staging, production …)
        domain: Only this certificate (name of its directory). Empty: all
        force: Renew even before it is due (e.g. after a leaked key)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Renew certificates", env, confirm, plan, changes=True) as report:
        block, now = env.certificates, datetime.now(UTC)
        every, served = read_all(block)
        chosen = _chosen(every, domain)
        found = [find_work(files, shown_for(files, every, served), force, now) for files in chosen]
        due = [work for work in found if work]
        _report_unreadable(report, chosen)
        judge_schedules(report)
        attach_certificates(report, every, served, now)
        if not due:
            _judge_unserved(report, chosen, [shown_for(files, every, served) for files in chosen])
            report.outcome = f"none of {len(chosen)} certificates is due"
            return report
        known = read_known(report, block)
        renewals = [_renewal(block, work) for work in due]
        _judge_certbot(report, block, due)
        chains = [work.files.directory / CHAIN for work in due]
        names = first_of([f"{work.kind} {work.files.name}" for work in due])
        effect = Effect(f"certificates: {names}", "certbot keeps the old files in its archive directory")
        results = list[str | OpsError | None]()
        pins = [lambda report: pin_paths(report, "certificates", *chains)]
        with carrying_out(report, *renewals, effect=effect, pins=pins) as carry:
            for renewal in renewals:
                try:
                    results.append(carry(renewal))
                except OpsError as error:  # reported after the others: it does not stop them
                    results.append(error)
        done = [_judge_result(report, block, *one, known) for one in zip(due, results, strict=True)]
        report.outcome = f"{sum(done)} of {len(due)} done"
    return report


def _chosen(every: Sequence[Files], domain: str) -> Sequence[Files]:
    names = [files.name for files in every]
    if not names:
        raise OpsError("[certificates] has no domains", "add domains to the environment's TOML")
    if domain and domain not in names:
        raise OpsError(
            f"there is no certificate “{domain[:60]}”", f"choose one of {', '.join(names)}, or leave it empty"
        )
    return [files for files in every if domain in ("", files.name)]


def _report_unreadable(report: Report, chosen: Sequence[Files]) -> None:
    """An unreadable certificate is skipped and does not block the others."""
    for files in chosen:
        if not files.chain and not files.missing:
            report.warn(f"{files.name}: skipped", files.trouble[1], value=files.trouble[0])


def _judge_unserved(report: Report, chosen: Sequence[Files], shown: Sequence[Sequence[Served]]) -> None:
    """Warn about a certificate without a configured server: after a killed run its reload can be missing."""
    for files, servers in zip(chosen, shown, strict=True):
        if files.chain and not any(one.server.protocol == "https" for one in servers):
            report.warn(
                f"{files.name}: served",
                f"add “{files.name}:443” to [certificates] served",
                value="not known: no configured web server presents it, so its reload cannot be checked",
            )


def _renewal(block: Certificates, work: Work) -> Change[[], str | None]:
    """Plan one task with its command. It returns the error of the web server's reload, empty for none."""
    files = work.files
    action: Callable[[], str | None]
    if work.kind == RELOAD:
        action = certbot.reload_web_server.bind(block, files.name)
    elif block.renew_command:
        action = certbot.run_given.bind(block, work.kind, files.names)
    else:
        action = certbot.run_certbot.bind(block, work.kind, files.names)
    line = shlex.join(certbot.command(block, work.kind, files.names))
    return Change(action, f"{work.kind} {files.name}", f"{work.why}: {line}")


def _judge_certbot(report: Report, block: Certificates, due: Sequence[Work]) -> None:
    """Require certbot and its port, but only if a task needs them."""
    if all(work.kind == certbot.RELOAD for work in due) or block.renew_command:
        return
    if block.challenge == "standalone":
        problem = certbot.read_port_problem(block.standalone_port)
        report.require(
            "port for standalone",
            not problem,
            "stop the process that listens there, or use webroot or dns-01",
            value=problem or f"{block.standalone_port} is free",
        )
    try:
        report.fact("certbot", certbot.read_version())
    except OpsError as error:
        report.fail("certbot", error.hint, value=error.message)


@dataclass(frozen=True)
class Work:
    """One task for one certificate, and its reason."""

    kind: Kind
    files: Files
    why: str


def find_work(files: Files, shown: Sequence[Served], force: bool, now: datetime) -> Work | None:
    """The task of a certificate; None if nothing is due, or if it cannot be read."""
    if files.missing:
        return Work(ISSUE, files, "it does not exist")
    if not files.chain:
        return None
    certificate = files.chain[0]
    if uncovered := [name for name in files.names if not certificate.covers(name)]:
        return Work(ISSUE, files, f"the existing one does not cover {', '.join(uncovered)}")
    if force or certificate.is_due(now):
        return Work(RENEW, files, f"{in_days(certificate.left(now))} left" + (", forced" if force else ""))
    old = [one.server.text for one in shown if _is_reloaded(one.server) and _is_older(one.certificate, certificate)]
    return Work(RELOAD, files, f"{', '.join(old)} presents an older one") if old else None


def _is_reloaded(server: TlsServer) -> bool:
    """Whether the web server's reload concerns it; a mail server or PostgreSQL can use the same files, or others."""
    return server.protocol == "https"


def _is_older(served: Certificate | None, file: Certificate) -> bool:
    return served is not None and served.parsed != file.parsed and served.begins < file.begins


def shown_for(files: Files, every: Sequence[Files], served: Sequence[Served]) -> list[Served]:
    """The servers for this certificate's names."""
    return [one for one in served if _name_is_of(one.server.name, files, every)]


def _name_is_of(name: str, files: Files, every: Sequence[Files]) -> bool:
    own = file_of(every, name)
    return own is files if own else name.lower() in files.names


def _judge_result(
    report: Report, block: Certificates, work: Work, result: str | OpsError | None, known: Sequence[Certificate]
) -> bool:
    """Report the result of one task and prove it. A failure is CRITICAL. Returns success."""
    name = f"{work.files.name}: {work.kind}"
    if isinstance(result, OpsError):
        what, hint = certbot.explain(result)
        report.fail(name, hint, value=f"{what}; {_files_after(block, work)}")
        return False
    report.require(
        name,
        not result,
        f"check the configuration of {block.web_server} (nginx -t), and run this again",
        value=result or "done",
    )
    return _prove(report, block, work, known) and not result


def _files_after(block: Certificates, work: Work) -> str:
    """After a failure: whether the files have changed."""
    if not work.files.chain:
        return "no certificate exists yet"
    now, before = read_files(Path(block.directory), work.files.names), work.files.chain[0]
    if now.chain != work.files.chain:
        return "but the files have changed: run check-certificates"
    return f"the old one stays in use, until {clock.text(before.ends, 'minutes')}"


def _prove(report: Report, block: Certificates, work: Work, known: Sequence[Certificate]) -> bool:
    """Check that the file has the new certificate, and that servers present it."""
    files = read_files(Path(block.directory), work.files.names)
    before = work.files.chain[0].parsed if work.files.chain else None
    new = bool(files.chain) and (work.kind == RELOAD or files.chain[0].parsed != before)
    hint = (
        "renew_command exited 0: check where it writes"
        if block.renew_command
        else "check certbot's log: it reports success"
    )
    if not report.require(
        f"{files.name}: new certificate",
        new,
        hint,
        value=f"serial {files.chain[0].serial_text}" if new else files.trouble[0] or "the old one",
    ):
        return False
    judge_files(report, files, known, datetime.now(UTC))
    servers = [server for server in block.servers() if _name_is_of(server.name, files, [files])]
    if not servers:
        report.warn(
            f"{files.name}: served",
            f"add “{files.name}:443” to [certificates] served",
            value="not known: no configured server presents it",
        )
    shown = [wait_until_served.submit(server, block.authorities, files.chain[0]) for server in servers]
    judged = [_judge_shown(report, one.result(), files, work.kind) for one in shown]  # judge every server
    return all(judged)


def _judge_shown(report: Report, shown: Served, files: Files, kind: Kind) -> bool:
    """WARN only for a new certificate, which can have no server yet, and for servers with their own files."""
    same, hint = same_as_file(shown.certificate, files) if shown.certificate else (False, shown.trouble[1])
    value = f"serial {shown.certificate.serial_text}" if shown.certificate else shown.trouble[0]
    lenient = kind == ISSUE or not _is_reloaded(shown.server)
    if not same and shown.certificate:
        hint = "configure it with the new files, and reload it" if lenient else hint
    return report.require(
        f"{shown.server.text}: presents the new one",
        same,
        hint,
        value=value,
        expected=f"serial {files.chain[0].serial_text}",
        worst=Status.WARN if lenient else Status.CRITICAL,
    )
