"""What an AWS account pays for: instances, disks, addresses, buckets, and the bill itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from blocks.cloud import Cloud
from runbook.errors import OpsError, Unreachable, excerpt
from runbook.kinds import probe

CPU_DAYS = 14
TOO_MANY, BROKEN = 429, 500
# Of what AWS has no capacity for now, by its code or status: EC2 and CloudWatch say it with 400 and 503, S3 with 503,
# Cost Explorer with LimitExceededException. https://docs.aws.amazon.com/general/latest/gr/api-retries.html
_BUSY = re.compile(r"Throttl|LimitExceeded|TooManyRequests|SlowDown|BandwidthLimit|PriorRequestNotComplete")
DAY_SECONDS = 86400


@dataclass(frozen=True)
class CloudInstance:
    """An EC2 instance; `cpu_percent` is its mean of two weeks, None where CloudWatch has no numbers."""

    id: str
    name: str
    kind: str
    state: str
    since: datetime
    cpu_percent: float | None


@dataclass(frozen=True)
class Volume:
    """A disk that no instance has."""

    id: str
    gigabytes: int
    since: datetime


@dataclass(frozen=True)
class BucketSize:
    """A bucket; `bytes` is of its standard storage, None where CloudWatch has no numbers (it counts once a day)."""

    name: str
    bytes: int | None


@dataclass(frozen=True)
class Cost:
    """What a service cost in a month, or in what there is of it."""

    month: str
    service: str
    amount: float
    unit: str


@probe
def read_instances(cloud: Cloud) -> list[CloudInstance]:
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeInstances.html

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    with _asked("EC2"):
        pages = cloud.client("ec2").get_paginator("describe_instances").paginate()
        found = [one for page in pages for reservation in page["Reservations"] for one in reservation["Instances"]]
        watch = cloud.client("cloudwatch")
        return [
            CloudInstance(
                one["InstanceId"],
                next((tag["Value"] for tag in one.get("Tags", []) if tag["Key"] == "Name"), ""),
                one["InstanceType"],
                one["State"]["Name"],
                one["LaunchTime"],
                _mean(watch, "AWS/EC2", "CPUUtilization", [("InstanceId", one["InstanceId"])], CPU_DAYS),
            )
            for one in found
            if one["State"]["Name"] != "terminated"
        ]


@probe
def find_unattached_volumes(cloud: Cloud) -> list[Volume]:
    """Disks with the status `available`: they are paid for, whoever uses them.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    with _asked("EC2"):
        wanted = [{"Name": "status", "Values": ["available"]}]
        pages = cloud.client("ec2").get_paginator("describe_volumes").paginate(Filters=wanted)
        found = [one for page in pages for one in page["Volumes"]]
        return [Volume(one["VolumeId"], int(one["Size"]), one["CreateTime"]) for one in found]


@probe
def find_unattached_addresses(cloud: Cloud) -> list[str]:
    """Elastic IPs that lead nowhere.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    with _asked("EC2"):
        found = cloud.client("ec2").describe_addresses()["Addresses"]
        return [one["PublicIp"] for one in found if not one.get("AssociationId") and not one.get("InstanceId")]


@probe
def read_buckets(cloud: Cloud) -> list[BucketSize]:
    """Sizes as CloudWatch counts them daily: nothing is listed.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    with _asked("S3"):
        names = [one["Name"] for one in cloud.client("s3").list_buckets()["Buckets"]]
        watch, found = cloud.client("cloudwatch"), []
        for name in names:
            places = [("BucketName", name), ("StorageType", "StandardStorage")]
            size = _mean(watch, "AWS/S3", "BucketSizeBytes", places, 2)
            found.append(BucketSize(name, None if size is None else int(size)))
        return found


@probe
def read_costs(cloud: Cloud, today: date) -> list[Cost]:
    """Last month's bill and this month's until today, by service. A question costs 0.01 USD at AWS.

    https://docs.aws.amazon.com/aws-cost-management/latest/APIReference/API_GetCostAndUsage.html

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    first = (today.replace(day=1) - timedelta(days=1)).replace(day=1)
    until = today + timedelta(days=1)
    with _asked("Cost Explorer"):
        answer = cloud.client("ce").get_cost_and_usage(
            TimePeriod={"Start": first.isoformat(), "End": until.isoformat()},
            Granularity="MONTHLY",
            Metrics=["UnblendedCost"],
            GroupBy=[{"Type": "DIMENSION", "Key": "SERVICE"}],
        )
        return [
            Cost(period["TimePeriod"]["Start"][:7], group["Keys"][0], float(cost["Amount"]), cost["Unit"])
            for period in answer["ResultsByTime"]
            for group in period["Groups"]
            for cost in [group["Metrics"]["UnblendedCost"]]
        ]


def _mean(watch: Any, namespace: str, metric: str, places: Sequence[tuple[str, str]], days: int) -> float | None:
    now = datetime.now(UTC)
    points = watch.get_metric_statistics(
        Namespace=namespace,
        MetricName=metric,
        Dimensions=[{"Name": name, "Value": value} for name, value in places],
        StartTime=now - timedelta(days=days),
        EndTime=now,
        Period=DAY_SECONDS,
        Statistics=["Average"],
    )["Datapoints"]
    return sum(point["Average"] for point in points) / len(points) if points else None


def _hint(code: str) -> str:
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html"""
    if any(part in code for part in ("AccessDenied", "Unauthorized", "NotAuthorized")):
        return "give the worker's role the right to read it"
    if any(
        part in code for part in ("Token", "Signature", "Credential", "AuthFailure", "UnrecognizedClient", "Expired")
    ):
        return "correct the worker's credentials, and compare this host's clock"
    return "correct [cloud] in the environment's TOML: the message names what it refuses"


@contextlib.contextmanager
def _asked(service: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        code = str(said.get("Code", ""))
        told = f"{service} refuses: {code} {str(said.get('Message', ''))[:200]}".strip()
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
        if _BUSY.search(code) or status == TOO_MANY or status >= BROKEN:
            raise Unreachable(told, "wait a minute, then run it again: no right is missing") from None
        raise OpsError(told, _hint(code)) from None
    except BotoCoreError as error:
        raise Unreachable(
            f"{service} does not answer: {excerpt(str(error), 200)}", "check [cloud] endpoint, region and credentials"
        ) from None
    except (
        ResponseParserError,
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
    ):  # botocore takes any JSON for an object
        raise OpsError(
            f"what answers as {service} is no such service: its answer cannot be read", "check [cloud] endpoint"
        ) from None
