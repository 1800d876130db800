"""Statements of clients without the texts in them: every notation, also where its end is cut off. And lines of logs
without their secrets, in a time proportional to their length."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from runbook import masking
from runbook.masking import masked_statement, without_logins

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("ALTER ROLE x PASSWORD 'hunter2'", "ALTER ROLE x PASSWORD '…'"),
        ("SELECT 'it''s hunter2', 1", "SELECT '…', 1"),
        (r"SELECT E'it\'s hunter2', 'hunter2'", "SELECT '…', '…'"),
        (r"SELECT 'a\', 'hunter2'", "SELECT '…', '…'"),
        (r"SELECT U&'\0441hunter2', n'hunter2', B'01' 'hunter2'", "SELECT '…', '…', '…' '…'"),
        ("DO $$ BEGIN PERFORM 'hunter2'; END $$", "DO '…'"),
        ("SELECT $x$ $$ hunter2 $x$, $1, a$b$c FROM t", "SELECT '…', $1, a$b$c FROM t"),
        ("UPDATE t SET a = 'hunter2 and mo", "UPDATE t SET a = '…'"),
        ("SELECT $$ hunter2", "SELECT '…'"),
        (r"SELECT E'hunter2\'", "SELECT '…'"),
        ("SELECT 1 -- it's\n, 'hunter2'", "SELECT 1 , '…'"),
        ("SELECT /* it's hunter2 */ 'hunter2'", "SELECT '…'"),
        ('SELECT "it\'s", \'hunter2\' FROM "a ""b"""', 'SELECT "it\'s", \'…\' FROM "a ""b"""'),
        ("SELECT  1\n  FROM\tt", "SELECT 1 FROM t"),
        ("", ""),
    ],
)
def test_no_text_is_shown_and_the_rest_is(statement: str, shown: str) -> None:
    assert masked_statement(statement) == shown
    assert SECRET not in masked_statement(statement)


@pytest.mark.parametrize(
    "text",
    [
        "postgres://u:pa@hunter2@db/x",
        "postgres://u:hunter2/x@db/x",
        "postgres://u:hunter2?x@db/x",
        'postgres://u:a"hunter2@db/x',
        "postgres://u:a hunter2@db/x",
        "postgres://u:a'hunter2@db:5432/x",
        "https://u:hunter2/x@h",
        "dsn=postgres%3A%2F%2Fu%3Ahunter2%40db",
        "postgres://a:b@h and redis://:x@hunter2@h2/0 by a@b.c",
    ],
)
def test_a_password_in_an_address_is_masked_however_it_is_written(text: str) -> None:
    for shown in (without_logins(text), masking.masked(text)):
        assert "hunter2" not in shown
        assert shown.startswith(text[:8])


@pytest.mark.parametrize(
    "text",
    [
        "host=db user=u password=hunter2 port=5432",
        r"host=db password='it\'s hunter2' user=u",
        r"password=it\ hunter2 x",
        'password=a"hunter2',
        "password=a/hunter2?x",
        '{"password": "a\\" hunter2"}',
        '{"password": "hunter2',
        r"{\"password\": \"hunter2\"}",
        "password='cut hunter2",
        "secret: 20262026hunter2",
        "passwd=hunter2'x",
        "Authorization: Bearer hunter2",
        '"Authorization": "Token hunter2"',
        "Cookie: a=b; session=hunter2",
        "authorization: Basic hunter2:x",
        "password%3Dhunter2%26x",
        "%22api_key%22%3A%22hunter2%22",
        "PASSWORD = hunter2",
    ],
)
def test_a_named_secret_is_masked_however_it_is_written(text: str) -> None:
    assert "hunter2" not in masking.masked(text)
    assert "secret" in masking.kinds_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "total_tokens=12 token: 34",
        "http://127.0.0.1:8000/a?b=c",
        "redis://cache:6379/0 refused",
        "password: null",
        "a-" * 8000,
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert masking.masked(text) == text


HOSTILE = (
    "a-",
    "a.",
    "a@",
    "@a.",
    "@a.a-",
    "a://",
    "a://b:c@",
    "http://a:",
    "ftp://a:b c",
    "token=",
    'token:"',
    "token=\\",
    "token='\"",
    "token ",
    "cookie:",
    '\\"',
    "eyJ-",
    "eyJaaaaaaaaa.",
    "bearer ",
    "-----BEGIN A",
    "requirepass ",
    "auth-pass x ",
    " >",
    "%3A%2F%2Fa%3A",
    "1",
    "0-",
    "'",
    "$a",
    "/*",
)


@pytest.mark.parametrize("mask", [masking.masked, without_logins, masked_statement])
def test_a_hostile_text_takes_no_more_than_its_length(mask: object) -> None:
    """1 MB of hostile texts against 100 kB: ten times the time where it is linear, a hundred times where it is not."""
    assert callable(mask)

    def seconds(size: int) -> float:
        started = time.process_time()
        for word in HOSTILE:
            mask(word * (size // len(HOSTILE) // len(word)))
        return time.process_time() - started

    small = min(seconds(100_000) for _ in range(3))
    assert seconds(1_000_000) < 35 * small + 0.5


def test_a_known_value_is_masked_in_every_form_and_a_short_one_as_a_word_only() -> None:
    secret = 'p@ss/w"é'
    text = f"given {secret!r}, {json.dumps(secret)}, {quote(secret)} and {quote(secret, safe='')}"
    shown = masking.without(text, [secret, ""])
    assert shown == "given '********', \"********\", ******** and ********"
    assert masking.without("role ab in abacus: ab", ["ab"]) == "role ******** in abacus: ********"
    given = {"PGPASSWORD": "x1", "HOME": "/root", "API_URL": "http://u:p@h", "EMPTY_TOKEN": ""}
    assert masking.secrets_given(given) == {"x1", "http://u:p@h"}


def test_one_module_has_the_rules() -> None:
    root = Path(masking.__file__).parents[1]
    own = {
        str(path.relative_to(root))
        for layer in ("runbook", "blocks", "tasks", "flows", "deployments")
        for path in (root / layer).rglob("*.py")
        if re.search(r'"[^"]*\*{8}|def _?(?:masked|hide|redacted)\(text', path.read_text(encoding="utf-8"))
    }
    assert own == {"runbook/masking.py", "tasks/alerts/channels.py"}, "channels: which values are its secrets"
