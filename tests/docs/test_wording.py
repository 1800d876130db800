"""The check of `make lint` that the texts that people read use the words of the writing guide."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import wording
from tests.docs.commands import ROOT


def test_a_page_is_read_without_its_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It ends\nwell.\n`whoever`\n\n    told\n\n```\nbeside\n```\n\n- one\n    - it tells\n")
    assert [(one.line, one.word) for one in wording.in_page(page)] == [(1, "ends well"), (12, "tells")]


def test_a_module_is_read_for_its_messages_and_the_docstrings_of_its_flows(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""Told to developers."""\n@flow(name="x")\ndef one():\n    """Whoever reads this in the UI."""\n'
        '    raise OpsError(f"{one} is gone", "look at it")\n\ndef two():\n    """Told."""\n'
    )
    assert [(one.line, one.word) for one in wording.in_module(module)] == [(4, "Whoever"), (5, "look at"), (5, "gone")]


@pytest.mark.parametrize(
    "fine",
    ["whatever their age", "Tell the users.", "its own page", "a stand-in", "the rooms", "a file stands in for it"],
)
def test_ordinary_english_is_left_alone(fine: str) -> None:
    assert not list(wording.in_text(fine))


def test_every_word_has_a_better_one() -> None:
    for word in ("told", "of its own", "Looks after", "stands in the", "brought back"):
        (found,) = [wording.Found(ROOT, 1, one) for _, one in wording.in_text(word)]
        assert found.better
