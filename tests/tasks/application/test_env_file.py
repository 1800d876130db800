"""One variable of the application's file: read as it is meant, and nothing else of the file changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.places import Application
from tasks.application.env_file import read_variable, set_variable

AROUND = "# V=old\nPORT=8000\nXV=a\n{}\nPASSWORD='s#cret'\n"


@pytest.mark.parametrize(
    ("line", "value", "after"),
    [
        ("V=one", "one", "V=two"),
        ('export V = "one"  # why', "one", 'export V = "two"  # why'),
        ("V='one'", "one", "V='two'"),
        ("V=one # why", "one", "V=two # why"),
        ("V=one#more", "one#more", "V=two"),
        ("V=", "", "V=two"),
        ("V=first\nV=one", "one", "V=first\nV=two"),
    ],
    ids=["plain", "double", "single", "comment", "no comment", "empty", "the last counts"],
)
def test_only_the_value_is_changed(tmp_path: Path, line: str, value: str, after: str) -> None:
    path = tmp_path / ".env"
    path.write_text(AROUND.format(line))
    application = Application(env_file=str(path))
    assert read_variable.work(application, "V", "key") == value
    assert set_variable.work(application, "V", "key", "two") == value
    assert path.read_text() == AROUND.format(after)


def test_a_link_stays_one_and_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "shared").write_bytes(b"V=one\r\nPORT=8000\r\n")
    (tmp_path / ".env").symlink_to("shared")
    application = Application(env_file=str(tmp_path / ".env"))
    assert set_variable.work(application, "V", "key", "two") == "one"
    assert (tmp_path / ".env").is_symlink()
    assert (tmp_path / "shared").read_bytes() == b"V=two\r\nPORT=8000\r\n"
