"""What checking and renewing certificates have in common, and the steps of a renewal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.places import Certificates
from blocks.tls import TlsServer
from flows.infrastructure.certificates.findings import in_days, judge_files, same_as_file
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report, Status
from tasks.certificates import certbot
from tasks.certificates.certbot import ISSUE, RELOAD, RENEW, Kind
from tasks.certificates.certificate import Certificate
from tasks.certificates.chain import read_authorities
from tasks.certificates.files import Files, file_of, read_files
from tasks.certificates.served import Served, read_served, wait_until_served


@dataclass(frozen=True)
class Work:
    """One thing to do for one certificate, and why."""

    kind: Kind
    files: Files
    why: str

    @property
    def act(self) -> Act:
        """What the permit names."""
        return Act(self.kind, self.files.name)


def read_all(block: Certificates) -> tuple[list[Files], list[Served]]:
    """All files, and all servers beside each other: one that hangs keeps nobody else waiting."""
    files = [read_files(Path(block.directory), names) for names in block.lineages()]
    pending = [read_served.submit(server, block.authorities) for server in block.servers()]
    return files, [one.result() for one in pending]


def read_known(report: Report, block: Certificates) -> Sequence[Certificate]:
    """Whom to believe; nobody, and it is told, where that cannot be read."""
    try:
        return read_authorities(block.authorities)
    except OpsError as error:
        report.fail("authorities", error.hint, value=f"{error.message}: no chain could be verified")
        return ()


def find_work(files: Files, shown: Sequence[Served], force: bool, now: datetime) -> Work | None:
    """What a certificate needs; nothing for one that cannot be read, which is told apart."""
    if files.missing:
        return Work(ISSUE, files, "there is none")
    if not files.chain:
        return None
    certificate = files.chain[0]
    if uncovered := [name for name in files.names if not certificate.covers(name)]:
        return Work(ISSUE, files, f"the one that is there is not for {', '.join(uncovered)}")
    if force or certificate.is_due(now):
        return Work(RENEW, files, f"{in_days(certificate.left(now))} left" + (", asked for" if force else ""))
    old = [one.server.text for one in shown if _is_reloaded(one.server) and _is_older(one.certificate, certificate)]
    return Work(RELOAD, files, f"{', '.join(old)} shows an older one") if old else None


def _is_reloaded(server: TlsServer) -> bool:
    """By what reloads the web server; a mail server or PostgreSQL may have the same files, or its own."""
    return server.protocol == "https"


def _is_older(served: Certificate | None, file: Certificate) -> bool:
    return served is not None and served.parsed != file.parsed and served.begins < file.begins


def shown_for(files: Files, every: Sequence[Files], served: Sequence[Served]) -> list[Served]:
    """By the servers that are asked for this certificate's names."""
    return [one for one in served if _name_is_of(one.server.name, files, every)]


def _name_is_of(name: str, files: Files, every: Sequence[Files]) -> bool:
    own = file_of(every, name)
    return own is files if own else name.lower() in files.names


def do(report: Report, permit: Permit, block: Certificates, work: Work, known: Sequence[Certificate]) -> bool:
    """One piece of work, and its proof; a failure is told, and the next one begins. Whether it went well."""
    name = f"{work.files.name}: {work.kind}"
    try:
        if work.kind == RELOAD:
            certbot.reload_web_server(permit, block, work.files.name)
            wrong = ""
        elif block.renew_command:
            wrong = certbot.run_given(permit, block, work.kind, work.files.names)
        else:
            wrong = certbot.run_certbot(permit, block, work.kind, work.files.names)
    except OpsError as error:
        what, hint = certbot.told(error)
        report.fail(name, hint, value=f"{what}; {_what_stays(block, work)}")
        return False
    report.require(
        name,
        not wrong,
        f"look at the configuration of {block.web_server} (nginx -t), and launch it again",
        value=wrong or "done",
    )
    return _prove(report, block, work, known) and not wrong


def _what_stays(block: Certificates, work: Work) -> str:
    """After a failure: whether the files are those of before."""
    if not work.files.chain:
        return "there is no certificate yet"
    now, before = read_files(Path(block.directory), work.files.names), work.files.chain[0]
    if now.chain != work.files.chain:
        return "and the files have changed all the same: launch check-certificates"
    return f"the old one stays in place, until {before.ends:%Y-%m-%d %H:%M} UTC"


def _prove(report: Report, block: Certificates, work: Work, known: Sequence[Certificate]) -> bool:
    """The new one is in the file, and served."""
    files = read_files(Path(block.directory), work.files.names)
    before = work.files.chain[0].parsed if work.files.chain else None
    new = bool(files.chain) and (work.kind == RELOAD or files.chain[0].parsed != before)
    made = (
        "renew_command exited 0: check where it writes"
        if block.renew_command
        else "look into certbot's log: it says that it went well"
    )
    if not report.require(
        f"{files.name}: new",
        new,
        made,
        value=f"serial {files.chain[0].serial_text}" if new else files.trouble[0] or "the old one",
    ):
        return False
    judge_files(report, files, known, datetime.now(UTC))
    servers = [server for server in block.servers() if _name_is_of(server.name, files, [files])]
    if not servers:
        report.warn(
            f"{files.name}: served",
            f"add “{files.name}:443” to [certificates] served",
            value="no server is asked for it: whether it is served is not known",
        )
    shown = [wait_until_served.submit(server, block.authorities, files.chain[0]) for server in servers]
    judged = [_judge_shown(report, one.result(), files, work.kind) for one in shown]  # all of them
    return all(judged)


def _judge_shown(report: Report, shown: Served, files: Files, kind: Kind) -> bool:
    """A certificate that was just issued may have no server yet, and others than the web server their own."""
    same, hint = same_as_file(shown.certificate, files) if shown.certificate else (False, shown.trouble[1])
    value = f"serial {shown.certificate.serial_text}" if shown.certificate else shown.trouble[0]
    lenient = kind == ISSUE or not _is_reloaded(shown.server)
    if not same and shown.certificate:
        hint = "have it read the new files, and reload it" if lenient else f"look at its configuration: {hint}"
    return report.require(
        f"{shown.server.text}: shows the new one",
        same,
        hint,
        value=value,
        expected=f"serial {files.chain[0].serial_text}",
        worst=Status.WARN if lenient else Status.CRITICAL,
    )
