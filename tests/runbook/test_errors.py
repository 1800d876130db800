"""Logins in addresses are masked wherever somebody reads; nothing else is."""

from __future__ import annotations

import pytest

from runbook.errors import without_logins


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://token@host/simple", "see https://********@host/simple"),
        ("https://a:b@host", "https://********@host"),
        ("postgresql+psycopg://grc:p-w@db/grc_db", "postgresql+psycopg://grc:********@db/grc_db"),
        ("redis://:pw@127.0.0.1:6379/0", "redis://:********@127.0.0.1:6379/0"),
    ],
)
def test_logins_are_masked(text: str, shown: str) -> None:
    assert without_logins(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        '{"url":"http://127.0.0.1:8000","email":"a@example.com"}',
        '{"dsn":"redis://127.0.0.1:6379","user":"tanaka@example.com"}',
        "http://backend:8000?email=bob@example.com",
        "s3://bucket/key@1",
        "0/16B3748",
        "a@example.com",
        "a-" * 100_000,  # in no time: each report masks all that it shows
    ],
)
def test_nothing_else_is(text: str) -> None:
    assert without_logins(text) == text
