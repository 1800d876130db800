"""FROM lines, and what their names say of the end of support."""

from __future__ import annotations

import tomllib
from datetime import date

import pytest

from runbook.errors import OpsError
from tasks.docker.bases import RELEASES, Base, find_bases, read_support, replaced

DOCKERFILE = """\
# syntax=docker/dockerfile:1
ARG PYTHON=3.11
ARG TAG="slim-bookworm"
FROM --platform=linux/amd64 python:${PYTHON}-$TAG AS build
ARG PYTHON=2
RUN echo FROM nowhere
from reg.example.com:5000/grc/node:20-alpine as web
FROM build AS test
FROM scratch
COPY --from=web / /
FROM redis@sha256:abc
"""


def test_from_lines_are_read_with_their_arguments_and_without_own_stages() -> None:
    found = find_bases(DOCKERFILE)
    assert [(one.line, one.reference) for one in found] == [
        (4, "python:3.11-slim-bookworm"),
        (7, "reg.example.com:5000/grc/node:20-alpine"),
        (11, "redis@sha256:abc"),
    ]
    assert [(one.repository, one.tag, one.digest) for one in found] == [
        ("python", "3.11-slim-bookworm", ""),
        ("reg.example.com:5000/grc/node", "20-alpine", ""),
        ("redis", "latest", "sha256:abc"),
    ]


def test_an_argument_without_a_value_is_told() -> None:
    assert find_bases("FROM python:${V:-3.12}")[0].tag == "3.12"
    with pytest.raises(OpsError, match=r"line 2 uses \$\{V\}, which has no value — give ARG V a default"):
        find_bases("ARG V\nFROM python:${V}\n")
    with pytest.raises(OpsError, match="line 1 cannot be read"):
        find_bases("FROM python:3 3 3")


def test_only_one_line_changes() -> None:
    text = "FROM a:1 AS x\nRUN echo a:1\nFROM  a:1\n"
    second = find_bases(text)[1]
    assert replaced(text, second, "a:2") == "FROM a:1 AS x\nRUN echo a:1\nFROM  a:2\n"


def named(reference: str) -> list[tuple[str, str, date | None, bool]]:
    return [(one.product, one.release, one.ends, one.known) for one in read_support(Base("", reference, 1))]


def test_the_name_says_what_is_in_it() -> None:
    assert named("python:3.11-slim-bookworm") == [
        ("python", "3.11", date(2027, 10, 31), True),
        ("debian", "bookworm", date(2028, 6, 30), True),
    ]
    assert named("reg:5000/library/node:20.11-alpine3.20") == [
        ("node", "20", date(2026, 4, 30), True),
        ("alpine", "3.20", date(2026, 4, 1), True),
    ]
    assert named("node:20-alpine") == [("node", "20", date(2026, 4, 30), True)]
    assert named("redis:7.4") == [("redis", "7.4", None, True)], "supported, without an announced end"
    assert named("python:4.0") == [("python", "4.0", None, False)]
    assert named("node:205-slim") == [("node", "205", None, False)], "not 20"
    assert named("python:3.1") == [("python", "3.1", None, False)], "not 3.11"
    assert named("debian:trixie-slim") == [("debian", "trixie", date(2030, 6, 30), True)]
    assert named("grc/own:1") == []


def test_every_table_has_a_source_and_a_day() -> None:
    for product, table in tomllib.loads(RELEASES.read_text()).items():
        assert table["source"].startswith("https://"), product
        assert isinstance(table["checked"], date), product
        assert all(not end or date.fromisoformat(end) for end in table["ends"].values()), product
