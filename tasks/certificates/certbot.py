"""certbot (https://eff-certbot.readthedocs.io/en/stable/using.html): issue and renew certificates by ACME."""

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
from runbook.guard.permit import Act
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
    "connection": "open port 80, or correct the name's address: the authority reaches no web server under that name",
    "unauthorized": "correct the name's address, webroot or hook: another host, directory or TXT record answers",
    "dns": "correct the name's DNS record (A, AAAA, CAA; TXT _acme-challenge for dns-01)",
    "caa": "allow the authority in the name's CAA record",
    "rateLimited": "wait until the time that the authority states; do not run this before",
}


@dataclass(frozen=True)
class Challenge:
    """A failed challenge: the name, the authority's error type, and its message."""

    name: str
    type: str
    detail: str

    @property
    def hint(self) -> str:
        """The next step."""
        return _HINTS.get(self.type, "read the authority's message, and certbot's log")


def failed_challenges(printed: str) -> list[Challenge]:
    """Parse the failed challenges from certbot's output."""
    return [Challenge(found["name"], found["type"], found["detail"].strip()) for found in _FAILED.finditer(printed)]


@probe
def read_version() -> str:
    """The version of certbot.

    Raises:
        OpsError: it is not installed, fails, hangs, or is another program.
    """
    try:
        done = shell.run(["certbot", "--version"], timeout_seconds=VERSION_SECONDS)
    except OpsError as error:
        raise OpsError(error.message, HOW_TO_INSTALL) from None
    if not (found := re.search(r"certbot (\d+\.\d+\S*)", done.stdout + done.stderr)):
        raise OpsError("the program certbot does not print a version", HOW_TO_INSTALL)
    return found[1]


def command(block: Certificates, kind: Kind, names: Sequence[str]) -> list[str]:
    """The command to run. certbot neither judges the due date again nor sleeps first.

    Raises:
        OpsError: the certificates' directory is not certbot's, or a name needs another challenge.
    """
    if kind == RELOAD:
        return block.reloading()
    if block.renew_command:
        return list(block.renew_command)
    live = Path(block.directory)
    if live.name != "live":
        hint = "set [certificates] directory to certbot's directory live, or set renew_command"
        raise OpsError(f"{live} is not certbot's directory live", hint)
    if block.challenge != "dns-01" and (wild := [name for name in names if name.startswith("*.")]):
        hint = 'set [certificates] challenge = "dns-01" with dns_plugin or dns_auth_hook'
        raise OpsError(f"{wild[0]} is a wildcard: no authority issues it by {block.challenge}", hint)
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
    """certbot's options for the challenge. The type is explicit: a certificate issued by DNS would keep it."""
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
    """Whether a renewal needs the challenge options: the TOML's hooks replace those of the first issue. A certificate
    that was issued by standalone, as in the manual, would need the web server's port again."""
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
    """Why a program cannot listen on a port of this host; "" if it can."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
    return ""


def _inherit(block: Certificates) -> tuple[str, ...]:
    return (*shell.NETWORK, *block.inherit)


@action(of=lambda kind, names: Act(kind, names[0]))
def run_given(block: Certificates, kind: Kind, names: Sequence[str]) -> str:
    """Issue or renew one certificate by `renew_command`, with OPS_CERTIFICATE (its directory) and OPS_CERTIFICATE_NAMES
    in its environment; then reload the web server. Returns the error of the reload, "" for none.

    Raises:
        CommandFailed: the command failed.
        OpsError: it did not end within CERTBOT_SECONDS.
    """
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


@action(of=lambda kind, names: Act(kind, names[0]))
def run_certbot(block: Certificates, kind: Kind, names: Sequence[str]) -> str:
    """Issue or renew one certificate; certbot's deploy hook reloads the web server. Returns the hook's error, "" for
    none: certbot exits 0 in both cases.

    Raises:
        CommandFailed: certbot failed; its `stdout` has the challenges.
        OpsError: it did not end within CERTBOT_SECONDS.
    """
    trust = {"REQUESTS_CA_BUNDLE": block.acme_authorities} if block.acme_authorities else {}
    argv, hint = command(block, kind, names), "check certbot's log (letsencrypt.log)"
    done = shell.run(
        argv, environment={**trust, "LC_ALL": "C"}, inherit=_inherit(block), timeout_seconds=CERTBOT_SECONDS, hint=hint
    )
    wrong = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "reported error code" in line]
    return "; ".join(wrong)


@action(of=lambda name: Act(RELOAD, name), idempotent=True)
def reload_web_server(block: Certificates, name: str) -> None:
    """Reload the web server's certificates; its connections continue.

    Raises:
        CommandFailed, OpsError: the reload failed.
    """
    hint = f"fix the configuration of {block.web_server} (nginx -t): until then it serves the old certificate"
    shell.run(block.reloading(), timeout_seconds=RELOAD_SECONDS, hint=hint)


def explain(error: OpsError) -> tuple[str, str]:
    """The reason and the next step; from the failed challenges, if there are any."""
    challenges = failed_challenges(error.stdout) if isinstance(error, CommandFailed) else []
    if not challenges:
        return error.message, error.hint
    what = "; ".join(f"the challenge of {one.name} failed ({one.type}): {one.detail}" for one in challenges)
    return what[:600], challenges[0].hint
