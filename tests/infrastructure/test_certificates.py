"""check_certificates: what is wrong with a file, with what is served, and that the one is the other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from flows.infrastructure.certificates.check import check_certificates
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.certificates import served, stapling
from tests.fixtures.servers import free_port
from tests.infrastructure import tls
from tests.infrastructure.authority import Authority, Issued, new_key, sign
from tests.infrastructure.conftest import NAME, Register, bad

APP = "app.test"
FILE = f"{APP} (file)"


def check() -> Report:
    """The report, also of a run that failed."""
    try:
        return check_certificates.fn(NAME)
    except RunbookFailed as error:
        return error.report


def test_all_is_well(register: Register, authority: Authority) -> None:
    live = register()
    files = authority.issue(APP, "*.app.test").write(live / APP)
    with (
        tls.listening(tls.over_tls(tls.context_of(files))) as https,
        tls.listening(tls.over_smtp(tls.context_of(files))) as smtp,
    ):
        register([f"{APP} www.app.test"], [f"{APP}@127.0.0.1:{https}", f"smtp://www.app.test@127.0.0.1:{smtp}"])
        report = check()
    assert bad(report) == {}
    (table,) = report.evidence
    assert [row[1] for row in table.rows] == ["app.test, *.app.test"] * 3
    assert len({row[4] for row in table.rows}) == 1
    assert report.outcome == "1 certificates in files, 2 servers"


@pytest.mark.parametrize(
    ("days", "life", "status"),
    [
        (31, 90, Status.OK),
        (29, 90, Status.WARN),
        (13, 90, Status.WARN),
        (6.5, 90, Status.CRITICAL),
        (-1, 90, Status.CRITICAL),
        (29, 398, Status.WARN),
        (16, 45, Status.OK),
        (14, 45, Status.WARN),
        (3, 45, Status.CRITICAL),
    ],
)
def test_how_long_it_is_valid(
    days: float, life: float, status: Status, register: Register, authority: Authority
) -> None:
    authority.issue(APP, days=days, life=life).write(register() / APP)
    (expiry,) = [finding for finding in check().findings if finding.name == f"{FILE}: expiry"]
    assert expiry.status is status
    assert bool(expiry.hint) is (status is not Status.OK)


def wrong_name(authority: Authority) -> Issued:
    return authority.issue("other.test")


def short_rsa(authority: Authority) -> Issued:
    return authority.issue(APP, key=rsa.generate_private_key(65537, 1024))  # noqa: S505


def small_curve(authority: Authority) -> Issued:
    return authority.issue(APP, key=ec.generate_private_key(ec.SECP224R1()))


def by_sha1(authority: Authority) -> Issued:
    """Nothing here signs with SHA-1 any more: another one's signature is named so."""
    key = rsa.generate_private_key(65537, 2048)
    between = sign("between", authority.root, authority=True, key=key)
    issued = sign(APP, between, names=[APP])
    encoded = issued.certificate.public_bytes(serialization.Encoding.DER)
    rsa_with = bytes.fromhex("2a864886f70d0101")
    named = x509.load_der_x509_certificate(encoded.replace(rsa_with + b"\x0b", rsa_with + b"\x05"))
    return Issued(named, issued.key, issued.above)


def must_staple(authority: Authority) -> Issued:
    return authority.issue(APP, staple=True)


def only_leaf(authority: Authority) -> Issued:
    issued = authority.issue(APP)
    return Issued(issued.certificate, issued.key)


def by_itself(authority: Authority) -> Issued:
    return sign(APP, None, names=[APP])


def other_root(authority: Authority) -> Issued:
    return Authority(root=sign("a stranger", None, authority=True, days=900, life=999)).issue(APP)


def impostor(authority: Authority) -> Issued:
    """In the chain: of the right name, with another key."""
    issued = authority.issue(APP)
    return Issued(issued.certificate, issued.key, (sign("between", authority.root, authority=True).certificate,))


def no_authority(authority: Authority) -> Issued:
    between = sign("www", authority.root, authority=False)
    return sign(APP, between, names=[APP], days=80)


def old_between(authority: Authority) -> Issued:
    between = sign("old", authority.root, authority=True, days=-1, life=400)
    return sign(APP, between, names=[APP], days=80)


def other_key(authority: Authority) -> Issued:
    issued = authority.issue(APP)
    return Issued(issued.certificate, new_key(), issued.above)


@pytest.mark.parametrize(
    ("make", "finding", "told"),
    [
        (wrong_name, "names", "it does not cover app.test"),
        (short_rsa, "strength", "RSA with 1024 bits"),
        (small_curve, "strength", "a curve of 224 bits"),
        (by_sha1, "strength", "signed with SHA1"),
        (by_sha1, "chain", "signed with SHA1, which clients no longer trust"),
        (must_staple, "must-staple", "browsers refuse it without a stapled OCSP response"),
        (only_leaf, "chain", "CN=between, which signed CN=app.test, is neither in the chain nor"),
        (by_itself, "chain", "CN=app.test is self-signed and not among the trusted authorities"),
        (other_root, "chain", "CN=a stranger, which signed CN=between, is neither"),
        (impostor, "chain", "CN=between is in the chain with another key"),
        (no_authority, "chain", "CN=www signed CN=app.test, but may not sign certificates"),
        (old_between, "chain", "CN=old, which signed CN=app.test, is valid from"),
        (other_key, "private key", "is not this certificate's key"),
    ],
    ids=[
        "name",
        "rsa",
        "curve",
        "sha1",
        "sha1-chain",
        "staple",
        "leaf",
        "itself",
        "stranger",
        "impostor",
        "no-authority",
        "old",
        "key",
    ],
)
def test_what_is_wrong_with_a_file_is_told(
    make: Callable[[Authority], Issued], finding: str, told: str, register: Register, authority: Authority
) -> None:
    make(authority).write(register() / APP)
    found = bad(check())[f"{FILE}: {finding}"]
    assert told in found.value
    assert found.hint


def removed(directory: Path) -> None:
    (directory / "fullchain.pem").unlink()


def garbage(directory: Path) -> None:
    (directory / "fullchain.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n\x00\xff")


def cut(directory: Path) -> None:
    content = (directory / "fullchain.pem").read_bytes()
    (directory / "fullchain.pem").write_bytes(content[: len(content) // 3])


def no_file(directory: Path) -> None:
    (directory / "fullchain.pem").unlink()
    (directory / "fullchain.pem").mkdir()


def no_key(directory: Path) -> None:
    (directory / "privkey.pem").unlink()


def garbage_key(directory: Path) -> None:
    (directory / "privkey.pem").write_text("no key")


def open_key(directory: Path) -> None:
    (directory / "privkey.pem").chmod(0o644)


@pytest.mark.parametrize(
    ("harm", "finding", "told"),
    [
        (removed, FILE, "fullchain.pem does not exist"),
        (garbage, FILE, "contains no readable certificate"),
        (cut, FILE, "contains no readable certificate"),
        (no_file, FILE, "is not a regular file"),
        (no_key, f"{FILE}: private key", "No such file"),
        (garbage_key, f"{FILE}: private key", "contains no readable key"),
        (open_key, f"{FILE}: private key", "has mode 644"),
    ],
    ids=["removed", "garbage", "cut", "directory", "no-key", "garbage-key", "open-key"],
)
def test_files_that_are_not_as_they_should_be(
    harm: Callable[[Path], None], finding: str, told: str, register: Register, authority: Authority
) -> None:
    live = register([APP, "second.test"])
    harm(authority.issue(APP).write(live / APP))
    authority.issue("second.test").write(live / "second.test")
    found = bad(check())
    assert told in found[finding].value
    assert found[finding].status is Status.CRITICAL
    assert found[finding].hint
    assert not [name for name in found if name.startswith("second.test (file)")], (
        "the others are looked at all the same"
    )


def test_one_that_is_renewed_and_not_reloaded(register: Register, authority: Authority) -> None:
    live = register()
    old = tls.context_of(authority.issue(APP, days=20).write(live / APP))
    with tls.listening(tls.over_tls(old)) as port:
        register(served=[f"{APP}@127.0.0.1:{port}"])
        assert f"{APP}@127.0.0.1:{port}: same as the file" not in bad(check())
        authority.issue(APP).write(live / APP)
        found = bad(check())[f"{APP}@127.0.0.1:{port}: same as the file"]
    assert found.hint.startswith("renewed but not reloaded")


def test_only_the_leaf_is_served(register: Register, authority: Authority) -> None:
    files = authority.issue(APP).write(register() / APP)
    (files / "cert.pem").write_bytes(only_leaf(authority).chain)
    leaf = (files / "fullchain.pem").read_bytes().split(b"-----END CERTIFICATE-----\n")[0]
    (files / "cert.pem").write_bytes(leaf + b"-----END CERTIFICATE-----\n")
    with tls.listening(tls.over_tls(tls.context_of(files, "cert.pem"))) as port:
        register(served=[f"{APP}@127.0.0.1:{port}"])
        found = bad(check())
    assert list(found) == [f"{APP}@127.0.0.1:{port}: verified"]
    assert "unable to get local issuer certificate" in found[f"{APP}@127.0.0.1:{port}: verified"].value
    assert "not cert.pem" in found[f"{APP}@127.0.0.1:{port}: verified"].hint


@pytest.mark.parametrize(
    ("make", "finding", "told"),
    [
        (wrong_name, "name", "presented for app.test: other.test"),
        (short_rsa, "strength", "RSA with 1024 bits"),
        (short_rsa, "verified", "too weak"),
        (by_itself, "verified", "self-signed certificate"),
        (other_root, "verified", "unable to get local issuer"),
        (old_between, "verified", "expired"),
    ],
    ids=["name", "weak", "weak-refused", "itself", "stranger", "expired"],
)
def test_what_is_wrong_with_what_is_served(
    make: Callable[[Authority], Issued], finding: str, told: str, register: Register, authority: Authority
) -> None:
    files = make(authority).write(register([]) / "elsewhere")
    with tls.listening(tls.over_tls(tls.context_of(files))) as port:
        register([], [f"{APP}@127.0.0.1:{port}"])
        found = bad(check())[f"{APP}@127.0.0.1:{port}: {finding}"]
    assert told in found.value
    assert found.status is Status.CRITICAL
    assert found.hint


def test_servers_that_show_nothing(register: Register, authority: Authority) -> None:
    """Each is told with what to do, and the good one is looked at all the same."""
    context = tls.context_of(authority.issue(APP).write(register() / APP))
    answers = [
        ("https", tls.says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "the server does not use TLS"),
        ("https", lambda connection: None, "no server answers|no handshake"),
        ("smtp", tls.says(b"554 no\r\n"), "“554 no” where SMTP says 220"),
        ("smtp", tls.over_smtp(context, offers=False), "offers no STARTTLS"),
        ("smtp", tls.says(b"x" * 9000), "where SMTP says 220"),
        ("postgres", tls.says(b"N"), "PostgreSQL has TLS off"),
        ("postgres", tls.says(b"E"), "not PostgreSQL"),
    ]
    expected = {
        f"127.0.0.1:{free_port()}": "no server answers: Connection refused",
        "nowhere.invalid:443": "unknown host nowhere",
    }
    with contextlib.ExitStack() as stack:
        for protocol, answer, told in answers:
            expected[f"{protocol}://127.0.0.1:{stack.enter_context(tls.listening(answer))}"] = told
        good = stack.enter_context(tls.listening(tls.over_tls(context)))
        register(served=[*expected, f"{APP}@127.0.0.1:{good}"])
        found = bad(check())
    assert list(found) == list(expected)
    for address, told in expected.items():
        assert any(text in found[address].value for text in told.split("|")), (address, found[address])
        assert found[address].hint


def test_servers_that_hang(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that sends a byte now and then gets no more time."""

    def drop_by_drop(connection: socket.socket) -> None:
        connection.settimeout(0.2)
        for _ in range(1000):
            connection.sendall(b"2")
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    return

    monkeypatch.setattr(served, "PATIENCE_SECONDS", 1.0)
    with tls.listening(tls.silent) as silent, tls.listening(drop_by_drop) as slow:
        addresses = [f"{protocol}://127.0.0.1:{silent}" for protocol in ("https", "smtp", "postgres")]
        register([], [*addresses, f"smtp://127.0.0.1:{slow}"])
        found = bad(check())
    assert [finding.value for finding in found.values()] == ["it did not answer within 1 s"] * 4


def test_what_could_not_be_looked_at_is_never_well(
    register: Register, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = register()
    files = must_staple(authority).write(live / APP)
    assert bad(check())[f"{APP}: served"].status is Status.WARN
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with tls.listening(tls.over_tls(tls.context_of(files))) as port:
        register(served=[f"{APP}@127.0.0.1:{port}"])
        assert "no program openssl" in bad(check())[f"{APP}@127.0.0.1:{port}: must-staple"].value
        (tmp_path / "root.pem").write_text("nobody")
        found = bad(check())
        assert found["authorities"].status is Status.CRITICAL
        assert "holds no authorities" in found[f"{APP}@127.0.0.1:{port}: verified"].value
    register([])
    assert "none is configured" in bad(check())["certificates"].value


@pytest.mark.parametrize(
    ("says", "status", "told"),
    [
        ("echo 'OCSP response: no response sent'", Status.CRITICAL, "stapled: nothing"),
        ("echo '    OCSP Response Status: successful (0x0)'", Status.OK, "stapled: successful"),
        ("echo garbage", Status.WARN, "does not report"),
        ("exit 3", Status.WARN, "openssl exited 3"),
        ("exec sleep 600", Status.WARN, "openssl did not end"),
    ],
    ids=["not", "stapled", "garbage", "fails", "hangs"],
)
def test_what_openssl_reports_about_stapling(
    says: str,
    status: Status,
    told: str,
    register: Register,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "openssl").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "bin" / "openssl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    if "sleep" in says:
        monkeypatch.setattr(stapling, "PATIENCE_SECONDS", 2)
    files = must_staple(authority).write(register() / APP)
    with tls.listening(tls.over_tls(tls.context_of(files))) as port:
        register(served=[f"{APP}@127.0.0.1:{port}"])
        (found,) = [one for one in check().findings if one.name == f"{APP}@127.0.0.1:{port}: must-staple"]
    assert found.status is status
    assert told in found.value
    assert bool(found.hint) is (status is not Status.OK)


@pytest.mark.parametrize(
    ("path", "line", "told"),
    [
        ("var/spool/cron/crontabs/root", '0 0 * * * certbot renew --quiet --post-hook "systemctl reload nginx"', True),
        (
            "etc/cron.d/certbot",
            "0 */12 * * * root test -x /usr/bin/certbot && perl -e 'sleep int(rand(1))' && certbot -q renew",
            True,
        ),
        ("etc/crontab", "# 0 0 * * * root certbot renew", False),
        ("etc/crontab", "0 0 * * * root certbot certificates", False),
    ],
    ids=["manual", "debian", "comment", "other"],
)
def test_a_second_schedule_is_told(
    path: str, line: str, told: bool, register: Register, authority: Authority, tmp_path: Path
) -> None:
    authority.issue(APP).write(register() / APP)
    (tmp_path / "host" / path).parent.mkdir(parents=True)
    (tmp_path / "host" / path).write_text(f"{line}\n")
    assert ("renewed by one schedule" in bad(check())) is told


def test_a_timer_is_a_schedule_and_debian_s_cron_file_then_is_none(
    register: Register, authority: Authority, tmp_path: Path
) -> None:
    authority.issue(APP).write(register() / APP)
    host = tmp_path / "host"
    for place in ("run/systemd/system", "etc/cron.d", "etc/systemd/system/timers.target.wants"):
        (host / place).mkdir(parents=True)
    (host / "etc/cron.d/certbot").write_text("0 0 * * * root test \\! -d /run/systemd/system && certbot -q renew\n")
    assert "renewed by one schedule" not in bad(check())
    timer = host / "etc/systemd/system/timers.target.wants/certbot.timer"
    timer.symlink_to("/lib/systemd/system/certbot.timer")
    assert bad(check())["renewed by one schedule"].value == str(timer)
