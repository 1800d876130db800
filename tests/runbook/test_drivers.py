"""No raw error of a driver reaches whoever launched a run: every class of them is a sentence with a next step."""

from __future__ import annotations

import re
from collections.abc import Iterator

import botocore.exceptions
import docker.errors
import httpx
import psycopg
import psycopg.errors
import pytest
import redis.exceptions
import sqlalchemy.exc

from runbook.drivers import described
from runbook.errors import RunbookFailed, Unreachable
from runbook.run import runbook
from tests.runbook.system import System


def subclasses(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    yield kind
    for one in kind.__subclasses__():
        yield from subclasses(one)


def errors() -> Iterator[BaseException]:
    """One of each class; what only its constructor could fill in is left out."""
    for root in (psycopg.Error, redis.exceptions.RedisError, httpx.HTTPError, httpx.InvalidURL,
                 botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, docker.errors.DockerException,
                 sqlalchemy.exc.SQLAlchemyError):  # fmt: skip
        for kind in subclasses(root):
            said = "the server said something\nDETAIL:  Key (email)=(hanako@example.com) already exists."
            try:
                yield kind(said)
            except (
                TypeError,
                KeyError,
                AttributeError,
                ValueError,
            ):  # it wants more to be made: its class alone is told
                error = kind.__new__(kind)
                error.args = (said,)
                if not isinstance(error, docker.errors.DockerException):
                    yield error


def test_every_error_of_every_driver_is_a_sentence_with_a_next_step() -> None:
    found = list(errors())
    assert len(found) > 300, "the drivers are there"
    for error in found:
        refused = described(error)
        assert refused is not None, type(error)
        assert refused.hint, type(error)
        assert not re.search(r"\b\w+(?:Error|Exception)\b", refused.message), refused.message
        assert "hanako@example.com" not in refused.message
    assert described(ValueError("no driver's")) is None


def test_a_run_that_meets_one_fails_with_that_sentence(system: System) -> None:
    cases = {
        "permission denied for table users": (psycopg.errors.InsufficientPrivilege, "that right"),
        "could not extend file": (psycopg.errors.DiskFull, "free-disk-emergency"),
        "terminating connection": (psycopg.errors.AdminShutdown, "start the server"),
        "deadlock detected": (psycopg.errors.DeadlockDetected, "launch it again"),
    }
    for said, (kind, hint) in cases.items():
        with pytest.raises(RunbookFailed) as caught, runbook("Restore", system):
            raise kind(said)
        (finding,) = caught.value.report.findings
        assert said in finding.name
        assert hint in finding.hint
        assert kind.__name__ not in caught.value.report.sentence()
    wrapped = sqlalchemy.exc.OperationalError("SELECT secret", {}, psycopg.errors.AdminShutdown("gone"))
    assert isinstance(described(wrapped), Unreachable)
    assert "SELECT secret" not in str(described(wrapped))
