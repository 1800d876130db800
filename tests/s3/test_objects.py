"""Small objects, listings, deletion, and what is wrong with a bucket, in one sentence."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.s3 import Bucket, bucket_and_prefix
from runbook.errors import OpsError, Unreachable, VerificationFailed
from tasks.s3 import objects
from tests.s3.proxy import Proxy
from tests.s3.servers import ACCESS_KEY, SECRET_KEY, S3Server


def change(changed: Bucket, /, **fields: Any) -> Bucket:
    return dataclasses.replace(changed, **fields)


def test_url() -> None:
    """A place in S3 is read from its URL; anything else is refused, without what may be a password."""
    assert bucket_and_prefix("s3://backups") == ("backups", "")
    assert bucket_and_prefix("s3://backups/grc/daily/") == ("backups", "grc/daily")
    for url in ("backups", "/var/backups", "s3://", "s3:///grc", "s3://b/../c", "s3://b//c", "s3://b/c?x=1", "s4://b"):
        with pytest.raises(OpsError, match="no place in S3"):
            bucket_and_prefix(url)
    with pytest.raises(OpsError) as caught:
        bucket_and_prefix("s3://key:secret@backups/grc")
    assert "secret" not in str(caught.value)


def test_write_list_read_delete(server: S3Server) -> None:
    """Keys are relative to the prefix, names are first components, and nothing is left after a deletion."""
    bucket = server.bucket("grc/daily")
    outside = change(bucket, prefix="grc")
    objects.write_small(outside, "other", b"not ours")
    written = {"a/manifest.json": b"{}", "a/data/日 本+1.json": b"x" * 200, "ab/manifest.json": b"", "note": b"n"}
    for key, content in written.items():
        objects.write_small(bucket, key, content)
    assert objects.list_names(bucket) == ["a", "ab", "note"]
    assert objects.list_objects(bucket, "a") == {"a/manifest.json": 2, "a/data/日 本+1.json": 200}
    assert objects.list_objects(bucket, "") == {key: len(content) for key, content in written.items()}
    assert {key: objects.read_small(bucket, key) for key in written} == written
    assert objects.read_small(bucket, "a/nothing") is None
    objects.write_small(bucket, "note", b"another")
    assert objects.read_small(bucket, "note") == b"another"
    objects.delete(bucket, [*written, "never/was"])
    assert objects.list_names(bucket) == []
    assert objects.read_small(outside, "other") == b"not ours"


def test_more_than_a_page(moto: S3Server) -> None:
    """Listings and deletions go on after a thousand."""
    bucket = moto.bucket()
    client = bucket.client()
    with ThreadPoolExecutor(16) as pool:
        keys = [f"b{number:04}/manifest.json" for number in range(1005)]
        list(pool.map(lambda key: client.put_object(Bucket=bucket.bucket, Key=bucket.key(key), Body=b""), keys))
    assert list(objects.list_objects(bucket, "")) == keys
    assert len(objects.list_names(bucket)) == 1005
    objects.delete(bucket, keys)
    assert objects.list_objects(bucket, "") == {}


def test_altered_small_object(server: S3Server) -> None:
    """A manifest that was overwritten with its metadata kept is no manifest."""
    bucket = server.bucket()
    objects.write_small(bucket, "a/manifest.json", b"{}")
    place = {"Bucket": bucket.bucket, "Key": "grc/a/manifest.json"}
    metadata = bucket.client().head_object(**place)["Metadata"]
    bucket.client().put_object(**place, Body=b"[]", Metadata=metadata)
    with pytest.raises(VerificationFailed, match="a/manifest.json"):
        objects.read_small(bucket, "a/manifest.json")


def test_altered_on_the_servers_disk(gateway: S3Server) -> None:
    """One flipped bit in what the server keeps, which it does not notice itself."""
    bucket, content = gateway.bucket(), b"a manifest of some length, seldom met elsewhere 4714"
    objects.write_small(bucket, "a/manifest.json", content)
    gateway.flip_stored_byte(content)
    with pytest.raises(VerificationFailed, match="a/manifest.json"):
        objects.read_small(bucket, "a/manifest.json")


def test_check_passes_and_leaves_nothing(server: S3Server) -> None:
    """A usable bucket passes, without an object or an unfinished upload left in it."""
    bucket = server.bucket()
    objects.check(bucket)
    assert objects.list_names(bucket) == []
    assert not bucket.client().list_multipart_uploads(Bucket=bucket.bucket, Prefix="grc/.writable").get("Uploads")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"secret_key": SecretStr("not/the+secret-4715")}, "the secret key is wrong"),
        ({"access_key": "nobody"}, "the access key is unknown"),
        ({"bucket": "nowhere-to-be-found"}, "the bucket does not exist"),
        ({"sse": "AES256"}, "the server cannot do that"),
        ({"lock_mode": "GOVERNANCE", "lock_days": 1}, "the bucket has no object lock"),
    ],
)
def test_check_says_what_is_wrong(gateway: S3Server, fields: dict[str, Any], said: str) -> None:
    """One sentence and what to do; never a secret; not the error that is tried again."""
    bucket = change(gateway.bucket(), **fields)
    with pytest.raises(OpsError, match=said) as caught:
        objects.check(bucket)
    assert caught.value.hint
    assert not isinstance(caught.value, Unreachable)
    shown = f"{caught.value} {bucket!r}"
    assert SECRET_KEY not in shown
    assert "secret-4715" not in shown, "its digits alone may be those of the bucket's name, or of the port"


def test_wrong_clock(cuttable: Bucket, proxy: Proxy) -> None:
    """A server that finds the clock wrong says so to the operator."""
    proxy.answer(403, "RequestTimeTooSkewed", times=9)
    with pytest.raises(OpsError, match="clock is wrong"):
        objects.list_names(cuttable)


def test_object_lock_missing_on_moto(moto: S3Server) -> None:
    """The other server's words for a bucket without object lock."""
    with pytest.raises(OpsError, match="the bucket has no object lock"):
        objects.check(moto.bucket(lock_mode="COMPLIANCE", lock_days=1))


def test_nobody_answers() -> None:
    """Transient, and says who does not answer; without half an hour of waiting."""
    bucket = Bucket("b", "p", "http://127.0.0.1:1", access_key="a", secret_key=SecretStr("b"), patience_seconds=0.5)
    with pytest.raises(Unreachable, match=r"no connection to http://127\.0\.0\.1:1"):
        objects.check(bucket)


@pytest.fixture
def no_chain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An account without any credentials of AWS; returns where its credentials file would be."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path / "credentials"


def test_credentials_of_the_chain(gateway: S3Server, no_chain: Path) -> None:
    """Without keys in the block: AWS's own chain, here a profile; without that, a clear refusal."""
    bucket = change(gateway.bucket(), access_key="", secret_key=SecretStr(""))
    with pytest.raises(OpsError, match="there are no credentials"):
        objects.check(bucket)
    with pytest.raises(OpsError, match="profile"):
        objects.check(change(bucket, profile="backup"))
    no_chain.write_text(f"[backup]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    objects.check(change(bucket, profile="backup"))
    with pytest.raises(OpsError, match="one half of a key pair"):
        objects.check(change(bucket, access_key=ACCESS_KEY))


def test_locked_objects(moto: S3Server) -> None:
    """Data is kept by the lock until its date, sidecars are not; a deletion of locked data only hides it."""
    bucket = moto.bucket(locked=True, lock_mode="COMPLIANCE", lock_days=30)
    objects.check(bucket)
    objects.write_small(bucket, "a/manifest.json", b"{}")
    objects.write_small(bucket, "a/verified.json", b"{}", lock=False)
    client = bucket.client()
    found = client.head_object(Bucket=bucket.bucket, Key="grc/a/manifest.json")
    assert found["ObjectLockMode"] == "COMPLIANCE"
    assert 29 <= (found["ObjectLockRetainUntilDate"] - found["LastModified"]).days <= 30
    assert "ObjectLockMode" not in client.head_object(Bucket=bucket.bucket, Key="grc/a/verified.json")
    assert objects.is_versioned(bucket)
    objects.delete(bucket, ["a/manifest.json"])
    assert objects.list_names(bucket) == ["a"]
    kept = client.get_object(Bucket=bucket.bucket, Key="grc/a/manifest.json", VersionId=found["VersionId"])
    assert kept["Body"].read() == b"{}"


def test_versioned_or_not(server: S3Server) -> None:
    """A server that knows no versions has none."""
    assert objects.is_versioned(server.bucket()) is False


def test_a_policy_that_does_not_tell_of_versions(cuttable: Bucket, proxy: Proxy) -> None:
    """Unknown is not no, and no failure."""
    proxy.answer(403, "AccessDenied", times=9)
    assert objects.is_versioned(cuttable) is None


def test_too_large_to_be_a_manifest(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before it is sent; one that is there is as good as altered."""
    bucket = server.bucket()
    objects.write_small(bucket, "a/manifest.json", b"x" * 1001)
    monkeypatch.setattr(objects, "SMALL_BYTES", 1000)
    with pytest.raises(VerificationFailed, match="has 1001 bytes"):
        objects.read_small(bucket, "a/manifest.json")
    with pytest.raises(OpsError, match=r"b has 1\.0 kB, and 1\.0 kB is the most"):
        objects.write_small(bucket, "b", b"x" * 1001)
    assert objects.list_names(bucket) == ["a"]


def test_deletion_refused(moto: S3Server) -> None:
    """A lock or a policy that forbids deletions: who deletes hears of it, with the key."""
    bucket = moto.bucket()
    objects.write_small(bucket, "a/manifest.json", b"{}")
    with Proxy(moto.port) as proxy:
        behind = change(bucket, endpoint=proxy.endpoint)
        proxy.answer(403, "AccessDenied", times=9)
        with pytest.raises(OpsError, match="access is denied"):
            objects.delete(behind, ["a/manifest.json"])
        refused = "<Error><Key>grc/a/manifest.json</Key><Code>AccessDenied</Code><Message>locked</Message></Error>"
        proxy.answer_with(200, f"<DeleteResult>{refused}</DeleteResult>")
        with pytest.raises(OpsError, match=r"1 of 2 objects .* grc/a/manifest\.json: AccessDenied locked"):
            objects.delete(behind, ["a/manifest.json", "a/data"])


@pytest.mark.parametrize("sse", ["AES256", "aws:kms"])
def test_encryption(moto: S3Server, sse: Any) -> None:
    """What is written is encrypted as configured."""
    bucket = moto.bucket(sse=sse)
    objects.check(bucket)
    objects.write_small(bucket, "a", b"x")
    assert bucket.client().head_object(Bucket=bucket.bucket, Key="grc/a")["ServerSideEncryption"] == sse


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
def test_overloaded_server(cuttable: Bucket, proxy: Proxy, status: int, code: str) -> None:
    """An overloaded server is asked again: more often than boto3 does by itself, and not for ever."""
    bucket = change(cuttable, patience_seconds=60.0)
    proxy.answer(status, code, times=4)
    objects.write_small(bucket, "a", b"x")
    assert proxy.faults == 4
    assert objects.read_small(bucket, "a") == b"x"
    proxy.answer(status, code, times=1000)
    with pytest.raises(Unreachable, match=code):
        objects.read_small(change(cuttable, patience_seconds=0.5), "a")
