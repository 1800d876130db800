"""review_resources on a real HTTP server that speaks AWS's protocols; with a real engine: tests/system."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from pydantic import SecretStr

from blocks.cloud import Cloud
from flows.infrastructure.images.resources import judge_instances, judge_size, review_resources
from runbook import kinds
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.report import Report, Status
from tasks.cloud.aws import CloudInstance, find_unattached_addresses, read_costs
from tasks.docker.inventory import ContainerLimits, Inventory
from tasks.docker.usage import ContainerUse
from tests.fixtures.faulty import FaultyHandler, FaultyServer, serving
from tests.infrastructure.test_choosing import container, inventory
from tests.s3.servers import S3Server

REGION = "eu-west-3"
TOML = """
name = "trial"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
"""
CLOUD = """
[cloud]
endpoint = "{endpoint}"
region = "eu-west-3"
access_key = "testing"
secret_key_env = "TRIAL_SECRET"
disk_price = 0.1
address_price = 3.6
prices_from = "a test"
"""


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    monkeypatch.setenv("TRIAL_SECRET", "testing")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [])
    (tmp_path / "trial.toml").write_text(TOML.format(base=tmp_path))
    return tmp_path / "trial.toml"


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def values(report: Report) -> dict[str, str]:
    return {one.name: f"{one.status}: {one.value}" for one in report.findings}


class Refusing(FaultyServer[str]):
    """Whatever is asked for is refused, by EC2's or Cost Explorer's form of an error."""

    def __init__(self) -> None:
        super().__init__(Refusal)
        self.code, self.status = "", 400


class Refusal(FaultyHandler):
    server: Refusing

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.code
        if "X-Amz-Target" in self.headers:
            self.send(self.server.status, json.dumps({"__type": code, "message": "as it is"}).encode())
        else:
            error = f"<Error><Code>{code}</Code><Message>as it is</Message></Error>"
            self.send(self.server.status, f"<Response><Errors>{error}</Errors></Response>".encode())


def test_what_is_throttled_lacks_no_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.cloud.ATTEMPTS", 1)
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [])
    right, credentials = "give the worker's role the right", "correct the worker's credentials"
    cases = {
        "wait a minute": (
            ("RequestLimitExceeded", 503),
            ("LimitExceededException", 400),
            ("Throttling", 400),
            ("TooManyRequestsException", 429),
            ("SlowDown", 503),
            ("ThrottlingException", 400),
            ("InternalError", 500),
        ),
        right: (("UnauthorizedOperation", 403), ("AccessDeniedException", 400)),
        credentials: (("AuthFailure", 401), ("UnrecognizedClientException", 400), ("RequestExpired", 400)),
        "correct [cloud]": (("InvalidParameterValue", 400),),
    }
    with serving(Refusing()) as server:
        cloud = Cloud(endpoint=server.url, region=REGION, access_key="testing", secret_key=SecretStr("testing"))
        asked = (find_unattached_addresses.work, lambda of: read_costs.work(of, date(2026, 2, 1)))
        for hint, answers in cases.items():
            for ask, (server.code, server.status) in zip(itertools.cycle(asked), answers, strict=False):
                with pytest.raises(OpsError, match=f"refuses: {server.code} as it is") as error:
                    ask(cloud)
                assert error.value.hint.startswith(hint), server.code
                assert isinstance(error.value, Unreachable) == (hint == "wait a minute"), server.code


def test_what_an_account_pays_for_and_nobody_uses(described: Path, moto: S3Server) -> None:
    endpoint = f"http://127.0.0.1:{moto.port}"
    add(described, CLOUD.format(endpoint=endpoint))

    def client(service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=endpoint,
            region_name=REGION,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            config=Config(request_checksum_calculation="when_required"),
        )

    ec2, s3 = client("ec2"), client("s3")
    ids = [one["InstanceId"] for one in ec2.run_instances(ImageId="ami-12c6146b", MinCount=2, MaxCount=2)["Instances"]]
    ec2.stop_instances(InstanceIds=ids[:1])
    disk = ec2.create_volume(Size=50, AvailabilityZone=f"{REGION}a")["VolumeId"]
    address = ec2.allocate_address()["PublicIp"]
    s3.create_bucket(Bucket="reviewed", CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket="reviewed", Key="a", Body=b"12345")
    month = date.today().replace(day=1)
    group = {"Keys": ["Amazon EC2"], "Metrics": {"UnblendedCost": {"Amount": "12.5", "Unit": "USD"}}}
    period = {"TimePeriod": {"Start": month.isoformat(), "End": month.isoformat()}, "Groups": [group]}
    bill = {"results": [{"ResultsByTime": [period], "DimensionValueAttributes": []}]}
    httpx.post(f"{endpoint}/moto-api/static/ce/cost-and-usage-results", json=bill, timeout=120).raise_for_status()
    report = review_resources.fn("trial")
    assert report.status is Status.WARN
    found = values(report)
    assert found["unattached disks"] == f"WARN: 50 GB in {disk}: 5.00 USD a month"
    assert found["unattached addresses"] == f"WARN: {address}: 3.60 USD a month"
    assert ids[0] in found["stopped instances"]
    assert ids[1] not in found["stopped instances"]
    assert ids[1] in found["CPU of instances"], "no numbers are not idle, and not well"
    assert found["the bill"] == "OK: read"
    assert report.facts[f"bill of {month:%Y-%m}"] == "12.50 USD"
    (table,) = [one for one in report.evidence if one.name == "Buckets"]
    assert dict(table.rows)["reviewed"].endswith(" B"), "moto counts in its own way"


def test_an_account_that_does_not_answer_is_told_part_by_part(described: Path) -> None:
    add(described, CLOUD.format(endpoint="http://127.0.0.1:1"))
    report = review_resources.fn("trial")
    assert report.status is Status.WARN
    told = [one for one in values(report).values() if one.startswith("WARN") and "does not answer" in one]
    assert len(told) == 5


def test_an_environment_that_pays_for_nothing(described: Path) -> None:
    with pytest.raises(RunbookFailed, match="neither .docker. nor .cloud."):
        review_resources.fn("trial")
    add(described, f'[docker]\nhost = "unix://{described.parent}/nothing"\n')
    report = review_resources.fn("trial")
    assert values(report)["not measured: Docker"].startswith("WARN: Docker at unix:")


def test_idle_and_oversized_containers_by_the_most_that_they_took() -> None:
    held: Inventory = inventory(
        containers=(
            container("idle", state="running"),
            container("busy", state="running"),
            container("roomy", state="running"),
        )
    )
    roomy = held.containers[2]
    object.__setattr__(roomy, "limits", ContainerLimits(512 << 20, 0, 1.0))
    quiet, little = ContainerUse(0.0, 1 << 20), ContainerUse(0.1, 20 << 20)
    taken = [
        {"idle": quiet, "busy": ContainerUse(0.9, 1), "roomy": little},
        {"idle": quiet, "busy": quiet, "roomy": quiet},
    ]
    report = Report("Review resources", "trial")
    judge_size(report, held, taken)
    assert values(report) == {
        "idle containers": "WARN: idle",
        "containers with too much memory": "WARN: roomy (21.0 MB of 536.9 MB; 67.1 MB is enough)",
    }


def test_an_instance_at_0_percent_is_idle() -> None:
    since = datetime.now(UTC) - timedelta(days=30)
    report = Report("Review resources", "trial")
    judge_instances(
        report,
        [
            CloudInstance("i-1", "web", "t3.large", "running", since, 0.0),
            CloudInstance("i-2", "api", "t3.large", "running", since, 40.0),
        ],
    )
    assert values(report)["idle instances"] == "WARN: web (t3.large) 0.0 %"
    assert values(report)["CPU of instances"] == "OK: known"
