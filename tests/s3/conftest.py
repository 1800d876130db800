"""The two servers, once for a test process, and files to send."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blocks.s3 import Bucket
from tasks.s3.multipart import PART_BYTES
from tasks.s3.writing import Upload
from tests.s3.proxy import Proxy
from tests.s3.servers import S3Server

MakeFile = Callable[..., Upload]
LARGE = 3 * PART_BYTES + 12345


@pytest.fixture(params=["gateway", "moto"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Each of them."""
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(gateway: S3Server) -> Iterator[Proxy]:
    """A proxy before the gateway."""
    with Proxy(gateway.port) as running:
        yield running


@pytest.fixture
def cuttable(gateway: S3Server, proxy: Proxy) -> Bucket:
    """A bucket behind the proxy, with little patience."""
    return gateway.bucket(endpoint=proxy.endpoint, patience_seconds=1.0)


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """A file of random content, with the key that it shall get."""

    def make(size: int, key: str = "20261125_020000/base.tar", seed: int = 1) -> Upload:
        content = random.Random(seed).randbytes(size)
        path = tmp_path / f"{seed}-{key.replace('/', '_')}"
        path.write_bytes(content)
        return Upload(path, key, hashlib.sha256(content).hexdigest(), size)

    return make


def kept(bucket: Bucket, key: str) -> tuple[bytes, dict[str, Any]]:
    """An object's content, and what the server says of it."""
    answer = bucket.client().get_object(Bucket=bucket.bucket, Key=bucket.key(key))
    return answer["Body"].read(), answer


def unfinished(bucket: Bucket, key: str) -> list[str]:
    """The ids of uploads of this very key that are begun and not completed."""
    answer = bucket.client().list_multipart_uploads(Bucket=bucket.bucket, Prefix=bucket.key(key))
    return [entry["UploadId"] for entry in answer.get("Uploads", []) if entry["Key"] == bucket.key(key)]


def begin(bucket: Bucket, upload: Upload, parts: dict[int, bytes], sha256: str = "") -> str:
    """What an interrupted attempt leaves."""
    client, place = bucket.client(), {"Bucket": bucket.bucket, "Key": bucket.key(upload.key)}
    started = client.create_multipart_upload(**place, Metadata={"sha256": sha256 or upload.sha256})
    for number, content in parts.items():
        client.upload_part(**place, UploadId=started["UploadId"], PartNumber=number, Body=content)
    return str(started["UploadId"])
