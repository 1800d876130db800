"""A page that fits a phone: nothing is lost by it. tests/ui/test_pages.py measures real pages in a browser."""

from __future__ import annotations

import random

import pytest

from runbook.page.markdown import escaped, fenced
from runbook.page.width import BREAK, PHONE, fit

HASH = "f9d16b6e7adb0dfea79a0b5d7fd22ea0ad1724309f84a8dc506fa68f166f1468"
ADDRESS = f"http://127.0.0.1:4200/v2/artifacts/artifact/{HASH}"
WIDE = "| database | prefix | keys | memory | share | average | types |\n|---|---|---|---|---|---|---|\n"


def test_what_fits_stays_as_it_is() -> None:
    page = "# ✅ Check · lab · OK\n\n- **lost:** nothing\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n`a b`"
    assert fit(page) == page


@pytest.mark.parametrize("before", ["", "- ", "## ", "### ", "| a |\n|---|\n| "])
def test_a_long_word_is_broken_after_a_sign_and_stays_whole_without_the_breaks(before: str) -> None:
    path = "/var/lib/postgresql/18/main/base/16384/pg_filenode_map_of_something_else"
    found = fit(f"{before}{path}")
    assert all(part.endswith(("/", "_")) for part in found.split(BREAK)[:-1])
    assert BREAK in found
    assert found.replace(BREAK, "").rstrip(" |") == f"{before}{path}"
    assert max(map(len, found.split(BREAK))) < 60


def test_code_and_hashes_are_broken_inside_their_marks() -> None:
    found = fit(f"`{HASH}` follows `{HASH}`")
    assert found.replace(BREAK, "") == f"`{HASH}` follows `{HASH}`"
    assert found.count(BREAK) == 2


def test_an_address_keeps_its_target() -> None:
    found = fit(f"see {ADDRESS}.")
    assert f"]({ADDRESS}.)" in found or f"]({ADDRESS})" in found
    link = f"[the report]({ADDRESS})"
    assert fit(link) == link
    picture = f"![steps](data:image/svg+xml;base64,{HASH * 100})"
    assert fit(picture) == picture


def test_an_entity_and_an_escaped_sign_stay_whole() -> None:
    text = escaped("<&*_|" * 30)
    assert fit(text) != text
    assert fit(text).replace(BREAK, "") == text
    assert all(not part.endswith(("\\", "&lt", "&am")) for part in fit(text).split(BREAK))


def test_columns_that_do_not_fit_are_joined_with_their_names() -> None:
    found = fit(f"{WIDE}| db 0 | interview: | 4,200 | 19.9 kB | 2.1% | 60 B | string 100.0% |").splitlines()
    assert found[:2] == ["| database | prefix |  |", "|---|---|---|"]
    assert found[2] == (
        "| db 0 | interview: | *keys* 4,200 · *memory* 19.9 kB · *share* 2.1% · *average* 60 B · *types* string 100.0% |"
    )


def test_two_columns_stay_two() -> None:
    (heading, _, row) = fit(f"| file | SHA-256 |\n|---|---|\n| {HASH} | {HASH} |").splitlines()
    assert heading == "| file | SHA-256 |"
    assert row.replace(BREAK, "") == f"| {HASH} | {HASH} |"


def test_a_block_of_code_becomes_lines_that_wrap() -> None:
    found = fit("before\n\n" + fenced("ERROR: `x` | *y*\n  indented <b>", "diff") + "\n\nafter")
    assert found == (
        "before\n\n<samp>ERROR: \\`x\\` \\| \\*y\\*</samp><br>\n<samp>&nbsp;&nbsp;indented &lt;b&gt;</samp><br>\n\n\nafter"
    )


def test_no_page_is_refused() -> None:
    """Values are anything at all; the rest of the page stays."""
    letters = "ab|`*[]()<>&\\_~#-/ \n候補é\u200b"
    for seed in range(300):
        chosen = random.Random(seed)
        text = "".join(chosen.choices(letters, k=400)) + "\n| a | b |\n|---|---|\n| 1 | 2 |\nend"
        assert fit(text).endswith("end"), seed
    assert PHONE < 390
