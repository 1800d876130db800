"""Statements of clients without the texts in them: every notation, also where its end is cut off."""

from __future__ import annotations

import pytest

from tasks.postgres.masking import masked

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
    assert masked(statement) == shown
    assert SECRET not in masked(statement)
