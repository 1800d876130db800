"""certbot (https://eff-certbot.readthedocs.io/en/stable/using.html): certificates issued and renewed by ACME."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blocks.places import Certificates
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.guard.permit import Permit
from runbook.kinds import action, probe

Kind = Literal["issue certificate", "renew certificate", "reload web server for"]
ISSUE: Kind = "issue certificate"
RENEW: Kind = "renew certificate"
RELOAD: Kind = "reload web server for"
VERSION_SECONDS, CERTBOT_SECONDS, RELOAD_SECONDS = 60.0, 600.0, 60.0
HOW_TO_INSTALL = "apt install certbot (or pip install certbot), for the worker's user"
_FAILED = re.compile(
    r"^\s*(?:Domain|Identifier):\s*(?P<name>\S+)\s*\n\s*Type:\s*(?P<type>\S+)\s*\n\s*Detail:\s*(?P<detail>.+)$",
    re.MULTILINE,
)
_HINTS = {
    "connection": "the authority reaches no web server under that name: open port 80, or correct the name's address",
    "unauthorized": "another host, directory or TXT record answers under that name: correct address, webroot or hook",
    "dns": "correct the name's record (A, AAAA, CAA; TXT _acme-challenge for dns-01) where its zone is kept",
    "caa": "let the authority issue for that name in its CAA record",
    "rateLimited": "wait: the authority says until when; do not launch it again before",
}


@dataclass(frozen=True)
class Challenge:
    """One that failed: of which name, the authority's kind of problem, and its words."""

    name: str
    type: str
    detail: str

    @property
    def hint(self) -> str:
        """What to do."""
        return _HINTS.get(self.type, "read what the authority says, and certbot's log")


def failed_challenges(printed: str) -> list[Challenge]:
    """What certbot prints of the challenges that the authority did not accept."""
    return [Challenge(found["name"], found["type"], found["detail"].strip()) for found in _FAILED.finditer(printed)]


@probe
def read_version() -> str:
    """certbot's own.

    Raises:
        OpsError: it is not installed, fails, hangs, or is something else.
    """
    try:
        done = shell.run(["certbot", "--version"], timeout_seconds=VERSION_SECONDS)
    except OpsError as error:
        raise OpsError(error.message, HOW_TO_INSTALL) from None
    if not (found := re.search(r"certbot (\d+\.\d+\S*)", done.stdout + done.stderr)):
        raise OpsError("the program certbot does not say its version", HOW_TO_INSTALL)
    return found[1]


def command(block: Certificates, kind: Kind, names: Sequence[str]) -> list[str]:
    """What is run. Whether it is time was judged before, so certbot is not asked again; nor does it sleep first.

    Raises:
        OpsError: the directory of certificates is not certbot's, or a name needs another challenge.
    """
    if kind == RELOAD:
        return block.reloading()
    if block.renew_command:
        return list(block.renew_command)
    live = Path(block.directory)
    if live.name != "live":
        hint = "name its directory live in [certificates] directory, or set renew_command to what makes them"
        raise OpsError(f"{live} is no directory of certbot's", hint)
    if block.challenge != "dns-01" and (wild := [name for name in names if name.startswith("*.")]):
        hint = 'set [certificates] challenge = "dns-01" with dns_plugin or dns_auth_hook'
        raise OpsError(f"{wild[0]} is a wildcard, which no authority issues by {block.challenge}", hint)
    places = ["--config-dir", str(live.parent)]
    if block.certbot_directory:
        places += ["--work-dir", block.certbot_directory, "--logs-dir", f"{block.certbot_directory}/logs"]
    common = ["--non-interactive", "--cert-name", names[0], *places, "--deploy-hook", shlex.join(block.reloading())]
    how = challenge_options(block)
    if kind == RENEW:
        how = how if _has_another(block, live.parent, names[0]) else []
        return ["certbot", "renew", "--no-random-sleep-on-renew", "--force-renewal", *how, *common]
    account = ["--email", block.email] if block.email else ["--register-unsafely-without-email"]
    server = ["--server", block.acme_server] if block.acme_server else []
    domains = [word for name in names for word in ("--domain", name)]
    return [
        "certbot",
        "certonly",
        "--agree-tos",
        *account,
        *server,
        "--renew-with-new-domains",
        *how,
        *common,
        *domains,
    ]


def challenge_options(block: Certificates) -> list[str]:
    """How certbot answers the authority's challenges. The kind is named: one that was issued by DNS keeps that."""
    by_http = ["--preferred-challenges", "http"]
    match block.challenge:
        case "webroot":
            return ["--webroot", "--webroot-path", block.webroot, *by_http]
        case "standalone":
            return ["--standalone", "--http-01-port", str(block.standalone_port), *by_http]
        case "dns-01":
            if block.dns_plugin:
                return list(block.dns_plugin)
            cleanup = ["--manual-cleanup-hook", shlex.join(block.dns_cleanup_hook)] if block.dns_cleanup_hook else []
            hooks = ["--manual-auth-hook", shlex.join(block.dns_auth_hook), *cleanup]
            return ["--manual", "--preferred-challenges", "dns", *hooks]


def _has_another(block: Certificates, configuration: Path, name: str) -> bool:
    """Whether a renewal must be told how: the hooks of the TOML count, not those of the first issue. A certificate that
    another tool issued by standalone, as the manual does, would want the web server's port again."""
    try:
        text = (configuration / "renewal" / f"{name}.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^authenticator\s*=\s*(\S+)\s*$", text, re.MULTILINE)
    stored = found[1] if found else ""
    match block.challenge:
        case "webroot":
            return stored == "standalone"
        case "standalone":
            return stored != "standalone"
        case "dns-01":
            return True


@probe
def read_port_problem(port: int) -> str:
    """Why a program cannot listen on a port of this host; "" where it can."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
    return ""


def _inherit(block: Certificates) -> tuple[str, ...]:
    return (*shell.NETWORK, *block.inherit)


@action
def run_given(permit: Permit, block: Certificates, kind: Kind, names: Sequence[str]) -> str:
    """Issue or renew one certificate by `renew_command`, with OPS_CERTIFICATE (its directory) and OPS_CERTIFICATE_NAMES
    in its environment; then reload the web server. Returns how the reload failed, "" where it did not.

    Raises:
        CommandFailed: the command failed.
        OpsError: it did not end in time.
    """
    permit.require(kind, names[0])
    variables = {"OPS_CERTIFICATE": str(Path(block.directory) / names[0]), "OPS_CERTIFICATE_NAMES": " ".join(names)}
    hint = "fix what renew_command prints, then run this again"
    shell.run(
        block.renew_command, environment=variables, inherit=_inherit(block), timeout_seconds=CERTBOT_SECONDS, hint=hint
    )
    try:
        shell.run(block.reloading(), timeout_seconds=RELOAD_SECONDS)
    except OpsError as error:
        return error.message
    return ""


@action
def run_certbot(permit: Permit, block: Certificates, kind: Kind, names: Sequence[str]) -> str:
    """Issue or renew one certificate; certbot's deploy hook reloads the web server. Returns what the hook did wrong, ""
    where nothing: certbot exits 0 then too.

    Raises:
        CommandFailed: certbot failed; its `stdout` tells of the challenges.
        OpsError: it did not end in time.
    """
    permit.require(kind, names[0])
    trust = {"REQUESTS_CA_BUNDLE": block.acme_authorities} if block.acme_authorities else {}
    argv, hint = command(block, kind, names), "look into certbot's log (letsencrypt.log)"
    done = shell.run(
        argv, environment={**trust, "LC_ALL": "C"}, inherit=_inherit(block), timeout_seconds=CERTBOT_SECONDS, hint=hint
    )
    wrong = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "reported error code" in line]
    return "; ".join(wrong)


@action(idempotent=True)
def reload_web_server(permit: Permit, block: Certificates, name: str) -> None:
    """Have it read its certificates again; its connections go on.

    Raises:
        CommandFailed, OpsError: it could not be told to.
    """
    permit.require(RELOAD, name)
    hint = f"look at the configuration of {block.web_server} (nginx -t): it serves the old one until it is right"
    shell.run(block.reloading(), timeout_seconds=RELOAD_SECONDS, hint=hint)


def told(error: OpsError) -> tuple[str, str]:
    """Why it failed, and what to do: the authority's own words, where it has any."""
    challenges = failed_challenges(error.stdout) if isinstance(error, CommandFailed) else []
    if not challenges:
        return error.message, error.hint
    what = "; ".join(f"the challenge of {one.name} failed ({one.type}): {one.detail}" for one in challenges)
    return what[:600], challenges[0].hint
