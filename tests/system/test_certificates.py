"""Certificates for real: certbot, an ACME server (pebble), nginx that serves them; PostgreSQL's TLS; openssl."""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.infrastructure.certificates.check import check_certificates
from flows.infrastructure.certificates.renewal import renew_certificates
from runbook import shell
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.certificates import served
from tasks.certificates.certbot import read_port_problem
from tests.fixtures.servers import PostgresServer, free_port
from tests.infrastructure.authority import Authority, Issued
from tests.infrastructure.conftest import NAME, Register, authority, bad, register

__all__ = ["authority", "register"]
pytestmark = pytest.mark.system
DEBIAN = Path("/usr/lib/postgresql/17/bin")
APP, WWW = "app.test", "www.app.test"
NGINX = """
user root;
pid {base}/nginx.pid;
error_log {base}/nginx.log;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    server {{ listen 127.0.0.1:{http}; root {base}/www; }}
    {tls}
}}
"""
TLS = """server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {live}/app.test/fullchain.pem;
    ssl_certificate_key {live}/app.test/privkey.pem;
}}"""


@dataclass
class Place:
    """nginx, pebble and its resolver, on ports of their own."""

    base: Path
    http: int
    https: int
    acme: int
    management: int
    resolver: int
    names: int
    trust: ssl.SSLContext
    root: bytes = b""

    def configure(self, tls: str = "") -> None:
        """Write nginx's configuration."""
        (self.base / "nginx.conf").write_text(NGINX.format(base=self.base, http=self.http, tls=tls))

    def serve(self) -> None:
        """Have nginx serve what is in the files."""
        self.configure(TLS.format(port=self.https, live=self.base / "live"))
        shell.run(self.reload)

    @property
    def reload(self) -> list[str]:
        return ["nginx", "-c", str(self.base / "nginx.conf"), "-s", "reload"]

    def point(self, path: str, **what: object) -> None:
        """Tell the resolver where a name is."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.names}/{path}", json.dumps(what).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            assert answer.status == 200

    def ask(self, url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=60, context=self.trust) as answer:  # noqa: S310
            return bytes(answer.read())

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            self.point("clear-a", host=APP)
            return (
                bool(self.ask(f"https://localhost:{self.acme}/dir"))
                and self.ask(f"http://127.0.0.1:{self.http}/") == b"here"
            )
        return False


@pytest.fixture
def place(tmp_path: Path, authority: Authority) -> Iterator[Place]:
    ports = [free_port() for _ in range(6)]
    trust = ssl.create_default_context(cadata=authority.root.chain.decode())
    found = Place(tmp_path, *ports, trust)
    for directory in ("www", "acme"):
        (tmp_path / directory).mkdir()
    (tmp_path / "www" / "index.html").write_text("here")
    own = authority.issue("localhost").write(tmp_path / "acme")
    settings = {
        "listenAddress": f"127.0.0.1:{found.acme}",
        "managementListenAddress": f"127.0.0.1:{found.management}",
        "certificate": str(own / "fullchain.pem"),
        "privateKey": str(own / "privkey.pem"),
        "httpPort": found.http,
        "tlsPort": found.https,
        "certificateValidityPeriod": 90 * 86400,
    }
    (tmp_path / "pebble.json").write_text(json.dumps({"pebble": settings}))
    found.configure()
    resolver = f"127.0.0.1:{found.resolver}"
    off = [word for name in ("doh", "http01", "https01", "tlsalpn01", "defaultIPv6") for word in (f"-{name}", "")]
    names = ["pebble-challtestsrv", *off, "-dns01", resolver, "-management", f"127.0.0.1:{found.names}"]
    pebble = ["pebble", "-config", tmp_path / "pebble.json", "-dnsserver", resolver]
    # Every challenge is really looked at, none is late, none refused by chance.
    exactly = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_AUTHZREUSE": "0", "PEBBLE_WFE_NONCEREJECT": "0"}
    with (
        (tmp_path / "servers.log").open("w") as log,
        shell.spawn(names, stdout=log, stderr=log),
        shell.spawn(pebble, environment=exactly, stdout=log, stderr=log),
        shell.spawn(["nginx", "-c", tmp_path / "nginx.conf", "-g", "daemon off;"], stdout=log, stderr=log),
    ):
        until(found.answers, what="the start of pebble and nginx", seconds=120)
        # Whom pebble's certificates come from: new with every start.
        found.root = found.ask(f"https://localhost:{found.management}/roots/0")
        (tmp_path / "acme.pem").write_bytes(authority.root.chain)
        yield found


def renew(**given: object) -> Report:
    try:
        return renew_certificates.fn(NAME, **given)  # type: ignore[arg-type]
    except RunbookFailed as error:
        return error.report


def check() -> Report:
    try:
        return check_certificates.fn(NAME)
    except RunbookFailed as error:
        return error.report


def serials() -> list[str]:
    """In the file, and as nginx shows it by both names."""
    (table,) = [evidence for evidence in check().evidence if evidence.name == "Certificates"]
    return [row[4] for row in table.rows]


def test_from_the_first_issue_to_a_renewal_that_fails(
    place: Place, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = place.base
    more = f"""
webroot = "{base}/www"
acme_server = "https://localhost:{place.acme}/dir"
acme_authorities = "{base}/acme.pem"
certbot_directory = "{base}/certbot"
reload = {json.dumps(place.reload)}
"""
    live = register([f"{APP} {WWW}"], [f"{APP}@127.0.0.1:{place.https}", f"{WWW}@127.0.0.1:{place.https}"], more)
    (base / "root.pem").write_bytes(place.root)

    plan = renew()
    assert plan.status is Status.PLANNED
    assert [step.step for step in plan.plan_steps] == ["issue certificate app.test"]
    assert list(live.iterdir()) == []

    first = renew(confirm=NAME)
    assert {name: finding.status for name, finding in bad(first).items()} == {
        f"{name}@127.0.0.1:{place.https}: presents the new one": Status.WARN for name in (APP, WWW)
    }, "no server has it yet"
    place.serve()
    until(lambda: bad(check()) == {}, what="nginx' reload", seconds=120)
    before = serials()
    assert len(set(before)) == 1
    assert renew(confirm=NAME).outcome == "none of 1 certificates is due"
    assert serials() == before

    renewed = renew(force=True, confirm=NAME)
    assert bad(renewed) == {}
    assert renewed.outcome == "1 of 1 done"
    after = serials()
    assert len(set(after)) == 1
    assert after != before

    place.point("add-a", host=WWW, addresses=["127.0.0.2"])
    failed = renew(force=True, confirm=NAME)
    assert failed.status is Status.CRITICAL
    (finding,) = bad(failed).values()
    assert f"the challenge of {WWW} failed (connection)" in finding.value
    assert "the old one stays in use, until" in finding.value
    assert "open port 80" in finding.hint
    assert serials() == after
    place.point("clear-a", host=WWW)

    configuration = (base / "nginx.conf").read_text()
    (base / "nginx.conf").write_text("garbage" + configuration)
    with monkeypatch.context() as impatient:  # it would wait in vain
        impatient.setattr(served, "RELOAD_SECONDS", 2.0)
        unloaded = bad(renew(force=True, confirm=NAME))
    assert "deploy-hook" in unloaded["app.test: renew certificate"].value
    assert unloaded[f"{APP}@127.0.0.1:{place.https}: presents the new one"].status is Status.CRITICAL
    file, shown, also = serials()
    assert shown == also == after[0] != file
    (base / "nginx.conf").write_text(configuration)
    loaded = renew(confirm=NAME)
    assert [step.step for step in loaded.plan_steps] == ["reload web server for app.test"]
    assert bad(loaded) == {}
    assert serials() == [file] * 3


HOOK = """
import json, os, sys, urllib.request
action, management, value = sys.argv[1], sys.argv[2], os.environ.get("OPS_TEST_VALUE") or os.environ["CERTBOT_VALIDATION"]
body = {"host": f"_acme-challenge.{os.environ['CERTBOT_DOMAIN']}."} | ({"value": value} if action == "set-txt" else {})
urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{management}/{action}", json.dumps(body).encode()))
"""


def test_a_wildcard_by_dns_a_record_that_is_wrong_and_a_certificate_by_standalone(
    place: Place, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, served = place.base, [f"{APP}@127.0.0.1:{place.https}", f"{WWW}@127.0.0.1:{place.https}"]
    (base / "hook.py").write_text(HOOK)
    hooks = {
        key: [sys.executable, str(base / "hook.py"), action, str(place.names)]
        for key, action in (("dns_auth_hook", "set-txt"), ("dns_cleanup_hook", "clear-txt"))
    }
    common = f"""
acme_server = "https://localhost:{place.acme}/dir"
acme_authorities = "{base}/acme.pem"
certbot_directory = "{base}/certbot"
reload = {json.dumps(place.reload)}
"""
    by_dns = (
        common
        + 'challenge = "dns-01"\ninherit = ["OPS_TEST_*"]\n'
        + "".join(f"{key} = {json.dumps(argv)}\n" for key, argv in hooks.items())
    )
    live = register([f"{APP} *.{APP}"], served, by_dns)
    (base / "root.pem").write_bytes(place.root)
    monkeypatch.setenv("OPS_TEST_VALUE", "something else")
    (finding,) = bad(renew(confirm=NAME)).values()
    assert f"the challenge of {APP} failed (unauthorized)" in finding.value
    assert not (live / APP).exists()
    monkeypatch.delenv("OPS_TEST_VALUE")
    assert {found.status for found in bad(renew(confirm=NAME)).values()} == {Status.WARN}, "no server has it yet"
    place.serve()
    until(lambda: bad(check()) == {}, what="nginx' reload", seconds=120)
    before = serials()
    renewed = renew(force=True, confirm=NAME)
    assert (bad(renewed), renewed.outcome) == ({}, "1 of 1 done")
    assert before != serials() == serials()[:1] * 3

    port = place.http
    live = register(["alone.test"], [], f'{common}challenge = "standalone"\nstandalone_port = {port}\n')
    assert bad(renew(confirm=NAME))["port for standalone"].value == f"port {port}: Address already in use"
    place.http = free_port()
    place.serve()
    until(lambda: not read_port_problem(port), what="nginx' other port", seconds=120)
    assert {name: found.status for name, found in bad(renew(confirm=NAME)).items()} == {
        "alone.test: served": Status.WARN
    }
    assert (live / "alone.test" / "fullchain.pem").exists()


def test_postgres_tls_and_what_is_not_stapled(register: Register, authority: Authority, tmp_path: Path) -> None:
    server = PostgresServer(programs=DEBIAN)

    def show(issued: Issued) -> None:
        for name, content in (("server.crt", issued.chain), ("server.key", issued.key_pem)):
            path = server.data / name
            path.write_bytes(content)
            path.chmod(0o600)
            server.account.own(path)

    with contextlib.ExitStack() as stack:
        stack.callback(server.remove)
        server.initdb()
        server.start()
        address = f"postgres://db.test@127.0.0.1:{server.port}"
        register([], [address])
        assert bad(check())[address].value == "PostgreSQL has TLS off"
        show(authority.issue("db.test"))
        server.sql("ALTER SYSTEM SET ssl = on")
        server.restart()
        assert bad(check()) == {}
        show(authority.issue("db.test", staple=True))
        server.restart()
        assert bad(check())[f"{address}: must-staple"].value == "stapled: nothing"
