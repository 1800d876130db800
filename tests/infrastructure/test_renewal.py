"""renew_certificates: what it decides, and a certbot that is not as it should be. Real renewals: tests/system."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.config import toml
from flows.infrastructure.certificates.check import check_certificates
from flows.infrastructure.certificates.renewal import renew_certificates
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.certificates import certbot
from tests.infrastructure import tls
from tests.infrastructure.authority import Authority
from tests.infrastructure.conftest import NAME, Register, bad

APP = "app.test"
REFUSED = """
Certbot failed to authenticate some domains (authenticator: webroot). The Certificate Authority reported these problems:
  Domain: app.test
  Type:   connection
  Detail: Get "http://app.test/.well-known/acme-challenge/x": dial tcp 127.0.0.2:80: connect: connection refused
"""
Certbot = Callable[[str], None]


def renew(**given: object) -> Report:
    """The report, also of a run that failed."""
    try:
        return renew_certificates.fn(NAME, **given)  # type: ignore[arg-type]
    except RunbookFailed as error:
        return error.report


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certbot:
    """Put a shell script in certbot's place."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def write(script: str, *, version: str = "echo certbot 4.0.0") -> None:
        text = f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; exit; fi\n{script}\n'
        (tmp_path / "bin" / "certbot").write_text(text)
        (tmp_path / "bin" / "certbot").chmod(0o755)

    return write


def content(live: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in live.rglob("*.pem")}


def test_nothing_is_due(register: Register, authority: Authority, program: Certbot) -> None:
    program("echo asked >&2; exit 9")
    live = register()
    authority.issue(APP, days=31).write(live / APP)
    for confirm in ("", NAME):
        report = renew(confirm=confirm)
        assert report.status is Status.WARN, "nobody is asked whether it is loaded"
        assert list(bad(report)) == [f"{APP}: served"]
        assert report.outcome == "none of 1 certificates is due"


def test_the_plan_says_what_is_due_and_why(register: Register, authority: Authority, program: Certbot) -> None:
    program("exit 9")
    live = register([APP, "new.test", "wide.test www.wide.test", "fresh.test"], more='email = "ops@app.test"')
    authority.issue(APP, days=29.5).write(live / APP)
    authority.issue("wide.test").write(live / "wide.test")
    authority.issue("fresh.test").write(live / "fresh.test")
    before = content(live)
    report = renew()
    assert report.status is Status.PLANNED
    steps = {step.step: step.detail for step in report.plan_steps}
    assert list(steps) == ["renew certificate app.test", "issue certificate new.test", "issue certificate wide.test"]
    assert steps["renew certificate app.test"].startswith("29.5 days left: certbot renew --no-random-sleep-on-renew")
    assert "--deploy-hook 'systemctl reload nginx'" in steps["renew certificate app.test"]
    assert steps["issue certificate new.test"].startswith(
        "it does not exist: certbot certonly --agree-tos --email ops@"
    )
    assert steps["issue certificate wide.test"].startswith("the existing one does not cover www.wide.test: certbot")
    assert steps["issue certificate wide.test"].endswith("--domain wide.test --domain www.wide.test")
    assert [step.step for step in renew(force=True, domain="fresh.test").plan_steps] == ["renew certificate fresh.test"]
    with pytest.raises(NotConfirmed):
        renew_certificates.fn(NAME, confirm="production")
    assert content(live) == before


@pytest.mark.parametrize(
    ("script", "version", "told", "hint"),
    [
        ("", None, "there is no program certbot", "apt install certbot"),
        ("", "echo hello", "does not print a version", "apt install certbot"),
        ("", "exit 3", "certbot exited 3", "apt install certbot"),
        ("echo garbage; exit 1", "echo certbot 4.0.0", "certbot exited 1", "letsencrypt.log"),
        ("exec sleep 600", "echo certbot 4.0.0", "certbot did not end within 2 s", "letsencrypt.log"),
        (
            f"cat <<'END'\n{REFUSED}END\nexit 1",
            "echo certbot 4.0.0",
            "the challenge of app.test failed (connection): Get",
            "open port 80",
        ),
        ("exit 0", "echo certbot 4.0.0", "the old one", "it reports success"),
    ],
    ids=["missing", "garbage-version", "version-fails", "fails", "hangs", "refused", "does-nothing"],
)
def test_a_certbot_that_does_not_renew_is_told_and_the_old_one_stays(
    script: str,
    version: str | None,
    told: str,
    hint: str,
    register: Register,
    authority: Authority,
    program: Certbot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = register([APP, "second.test"])
    for name in (APP, "second.test"):
        authority.issue(name, days=5).write(live / name)
    before = content(live)
    if version is None:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    else:
        program(script, version=version)
    if "sleep" in script:
        monkeypatch.setattr(certbot, "CERTBOT_SECONDS", 2.0)
    found = [finding for finding in bad(renew(confirm=NAME)).values() if finding.status is Status.CRITICAL]
    assert told in found[0].value
    assert hint in found[0].hint
    assert ("; the old one stays in use, until" in found[0].value) is (
        hint not in ("apt install certbot", "it reports success")
    )
    assert content(live) == before
    assert len(found) == (2 if "4.0" in (version or "") else 1), "the next one is tried all the same"


def test_challenges_other_than_webroot_are_in_the_command_and_checked_when_registered(
    register: Register, authority: Authority, program: Certbot
) -> None:
    program("exit 9")
    hooks = 'challenge = "dns-01"\ndns_auth_hook = ["/opt/add record"]\ndns_cleanup_hook = ["/opt/remove", "-q"]'
    live = register([f"{APP} *.{APP}", "old.test"], more=hooks)
    authority.issue("old.test", days=5).write(live / "old.test")
    steps = {step.step: step.detail for step in renew().plan_steps}
    manual = (
        "--manual --preferred-challenges dns --manual-auth-hook ''\"'\"'/opt/add record'\"'\"'' --manual-cleanup-hook"
    )
    assert manual in steps["issue certificate app.test"], steps
    assert manual in steps["renew certificate old.test"], "the hooks of the TOML count"
    register([APP], more='challenge = "dns-01"\ndns_plugin = ["--dns-route53"]')
    assert " --renew-with-new-domains --dns-route53 " in renew().plan_steps[0].detail
    register([f"{APP} *.{APP}"])
    assert any("*.app.test is a wildcard" in name for name in bad(renew()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        register([APP], more=f'challenge = "standalone"\nstandalone_port = {port}')
        report = renew()
    assert f"--standalone --http-01-port {port} " in report.plan_steps[0].detail
    assert bad(report)["port for standalone"].value == f"port {port}: Address already in use"
    for wrong in ('challenge = "dns-01"', 'dns_plugin = ["--dns-route53"]', 'challenge = "dns-01"\ndns_plugin = ["x"]'):
        register([APP], more=wrong)
        with pytest.raises(OpsError, match="dns_plugin"):
            renew_certificates.fn(NAME)


def test_a_given_command_renews_and_what_it_does_not_do_is_found(
    register: Register, authority: Authority, tmp_path: Path
) -> None:
    made, log = tmp_path / "made", tmp_path / "log"
    script = f'test "$OPS_CERTIFICATE_NAMES" = "{APP} www.{APP}" && mkdir -p "$OPS_CERTIFICATE" && '
    good = script + f'cp {made}/*.pem "$OPS_CERTIFICATE"'

    def given(script: str, reload: str = "true") -> Path:
        more = (
            f'renew_command = ["sh", "-c", """{script}"""]\nreload = ["sh", "-c", "{reload}; echo reloaded >> {log}"]'
        )
        return register([f"{APP} www.{APP}"], more=more)

    live = given(good)
    authority.issue(APP, f"www.{APP}").write(made)
    plan = renew()
    assert [step.step for step in plan.plan_steps] == ["issue certificate app.test"]
    assert plan.plan_steps[0].detail.startswith("it does not exist: sh -c ")
    report = renew(confirm=NAME)
    assert [name for name, found in bad(report).items() if found.status is Status.CRITICAL] == [], report.sentence()
    assert (live / APP / "fullchain.pem").read_bytes() == (made / "fullchain.pem").read_bytes()
    assert log.read_text() == "reloaded\n"

    authority.issue(APP, f"www.{APP}").write(made)
    before = content(live)
    for script, reload, name, told in (
        ("echo no route to the authority >&2; exit 7", "true", f"{APP}: renew certificate", "exited 7"),
        ("true", "true", f"{APP}: new certificate", "the old one"),
        (good, "exit 3", f"{APP}: renew certificate", "exited 3"),
    ):
        given(script, reload)
        assert content(live) == before
        found = bad(renew(force=True, confirm=NAME))[name]
        assert (found.status, told in found.value) == (Status.CRITICAL, True), found


def test_one_that_cannot_be_read_is_left_alone_and_keeps_no_other(
    register: Register, authority: Authority, program: Certbot
) -> None:
    program("exit 1")
    live = register([APP, "second.test"])
    for name in (APP, "second.test"):
        authority.issue(name, days=5).write(live / name)
    (live / APP / "fullchain.pem").write_text("garbage")
    report = renew()
    assert [step.step for step in report.plan_steps] == ["renew certificate second.test"]
    assert "contains no readable certificate" in bad(report)[f"{APP}: skipped"].value


def test_one_that_was_renewed_and_not_loaded_is_loaded(
    register: Register, authority: Authority, tmp_path: Path
) -> None:
    """As after a run that was killed behind certbot, or with a hook that failed. This server reads other files, which
    its reload copies."""
    live, loaded = register(), tmp_path / "loaded"
    old = authority.issue(APP, days=20)
    old.write(loaded)
    authority.issue(APP).write(live / APP)

    with tls.listening(lambda connection: tls.over_tls(tls.context_of(loaded))(connection)) as port:
        served = [f"{APP}@127.0.0.1:{port}"]
        register(served=served, more='reload = ["false"]')
        assert renew().plan_steps[0].step == "reload web server for app.test"
        failed = bad(renew(confirm=NAME))["app.test: reload web server for"]
        assert "nginx -t" in failed.hint
        register(served=served, more=f'reload = ["cp", "-r", "{live / APP}/.", "{loaded}"]')
        report = renew(confirm=NAME)
        assert bad(report) == {}
        assert report.outcome == "1 of 1 done"
        assert renew(confirm=NAME).outcome == "none of 1 certificates is due"


def test_another_server_of_the_name_may_have_a_certificate_of_its_own(
    register: Register, authority: Authority, tmp_path: Path
) -> None:
    """The hook reloads the web server: a mail server that shows an older one is no reason to, night after night."""
    live = register()
    mail = tls.context_of(authority.issue(APP, days=60).write(tmp_path / "mail"))
    authority.issue(APP).write(live / APP)
    with tls.listening(tls.over_smtp(mail)) as port:
        register(served=[f"smtp://{APP}@127.0.0.1:{port}"], more='reload = ["false"]')
        assert renew(confirm=NAME).outcome == "none of 1 certificates is due"


def test_in_a_flow_run_too(prefect_server: str, register: Register, authority: Authority, tmp_path: Path) -> None:
    live, loaded = register(), tmp_path / "loaded"
    authority.issue(APP, days=20).write(loaded)
    authority.issue(APP).write(live / APP)
    with tls.listening(lambda connection: tls.over_tls(tls.context_of(loaded))(connection)) as port:
        register(served=[f"{APP}@127.0.0.1:{port}"], more=f'reload = ["cp", "-r", "{live / APP}/.", "{loaded}"]')
        with toml.environment(NAME).stands_in():
            assert renew_certificates(NAME).status is Status.PLANNED
            assert bad(renew_certificates(NAME, confirm=NAME)) == {}
            assert bad(check_certificates(NAME)) == {}


@pytest.mark.parametrize(
    ("more", "given", "message"),
    [
        ("", {"domain": "other.test"}, "there is no certificate “other.test” — choose one of app.test"),
        ('directory = "{base}/elsewhere"', {"confirm": NAME}, "is not certbot's directory live"),
    ],
    ids=["domain", "directory"],
)
def test_what_makes_no_sense_is_told(
    more: str, given: dict[str, str], message: str, register: Register, tmp_path: Path
) -> None:
    register()
    path = tmp_path / "trial.toml"
    if more:
        path.write_text(path.read_text().replace(f'directory = "{tmp_path}/live"', more.format(base=tmp_path)))
    with pytest.raises(RunbookFailed) as error:
        renew_certificates.fn(NAME, **given)
    (finding,) = [one for one in error.value.report.findings if one.status is Status.CRITICAL]
    assert message in f"{finding.name} — {finding.hint}"


@pytest.mark.parametrize(
    ("domains", "served", "told"),
    [
        (["../app"], [], "names no certificate"),
        ([""], [], "names no certificate"),
        (["*.app.test"], [], "names no certificate"),
        ([APP], ["app.test"], "is no server"),
        ([APP], ["ftp://app.test:21"], "is no server"),
        ([APP], ["app.test:99999"], "is no server"),
        ([APP], ["a b@app.test:443"], "is no"),
    ],
    ids=["path", "empty", "wildcard", "no-port", "protocol", "port", "name"],
)
def test_the_toml_is_checked(domains: list[str], served: list[str], told: str, register: Register) -> None:
    register(domains, served)
    with pytest.raises(OpsError, match=rf"trial.toml: \[certificates\] \w+ is wrong: found .* — expected: .*{told}"):
        renew_certificates.fn(NAME)
