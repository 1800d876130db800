"""docs/security.md names a test for each of its claims: each exists."""

from __future__ import annotations

import re

import pytest

from tests.docs.commands import ROOT

NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")
CLAIMS = NAMED.findall((ROOT / "docs" / "security.md").read_text(encoding="utf-8"))


def test_tests_are_named() -> None:
    assert len(CLAIMS) > 10


@pytest.mark.parametrize(("file", "name"), CLAIMS, ids=[name for _, name in CLAIMS])
def test_a_claim_has_its_test(file: str, name: str) -> None:
    assert re.search(rf"^ *def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)
