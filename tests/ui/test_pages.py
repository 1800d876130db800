"""The pages of many runbooks: none is wider than the window, and each runbook that they name opens its form."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from playwright.sync_api import expect
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.utilities.schema_tools.validation import validate

from deployments import deploy
from lab.client import Lab
from runbook.language.say import Language
from tests.test_deployments import deployments as entries
from tests.ui.browser import Operator, given
from tests.ui.language import LANGUAGE
from tests.ui.reports import Published, collect
from tests.ui.width import WIDTHS, too_wide

pytestmark = pytest.mark.system

RUNBOOKS, AT_ONCE, CLICKS = 60, 12, 8
FORM = re.compile(r"/deployments/deployment/([0-9a-f-]{36})/run\?")


@pytest.fixture(scope="module")
def own(place: Lab) -> Mapping[str, DeploymentResponse]:
    """The lab's runbooks in Prefect, by the flow's name."""
    there = deploy.deployed(entries(), place.name)
    return {name.partition("/")[0]: one for name, one in there.items() if name.endswith(f"/{place.name}")}


@pytest.fixture(scope="module")
def published(own: Mapping[str, DeploymentResponse]) -> list[Published]:
    """A page of each runbook that only reads."""
    found = collect(own, LANGUAGE)
    assert len({one.runbook for one in found}) >= RUNBOOKS
    return found


def publish(page: str) -> str:
    """An artifact of that Markdown; its page."""
    with get_client(sync_client=True) as client:
        made = client.create_artifact(ArtifactCreate(key="pages", type="markdown", data=page))
    return f"/artifacts/artifact/{made.id}"


@pytest.mark.parametrize("language", ["en", "ja"])
def test_no_page_is_wider_than_the_window(language: Language, published: list[Published], somebody: Operator) -> None:
    """At a desk and on a phone, with everything unfolded. Several reports on one page: each begins with its heading."""
    pages = [one.pages[language] for one in published]
    for some in (pages[start : start + AT_ONCE] for start in range(0, len(pages), AT_ONCE)):
        somebody.open(publish("\n\n".join(some)))
        expect(somebody.page.get_by_role("heading", level=1)).to_have_count(len(some))
        for width in WIDTHS:
            assert too_wide(somebody.page, width) == [], f"wider than {width}"


def test_that_measure_sees_what_is_too_wide(somebody: Operator) -> None:
    for text in ("| a |\n|---|\n| " + "x" * 300, "```\n" + "x " * 300 + "\n```", f"`{'x' * 300}`", "# " + "x" * 200):
        somebody.open(publish(f"# Report\n\n<details><summary>more</summary>\n\n{text}\n\n</details>"))
        expect(somebody.page.get_by_role("heading", name="Report", level=1)).to_be_visible()
        assert all(too_wide(somebody.page, width) for width in WIDTHS), text


@pytest.mark.parametrize("language", ["en", "ja"])
def test_each_runbook_that_a_page_names_is_a_link(
    language: Language, published: list[Published], own: Mapping[str, DeploymentResponse]
) -> None:
    """Everywhere but in commands, and in what programs printed."""
    named = "|".join(name for name in own if "-" in name)  # `escalate` is a verb as well
    names = re.compile(rf"(?<![\w./-])(?:{named})(?![\w/-]|\.\w)", re.ASCII)
    left = {(one.runbook, text) for one in published for text in unlinked(one.pages[language]) if names.search(text)}
    assert left == set()
    assert sum(len(FORM.findall(one.pages[language])) for one in published) > RUNBOOKS


def test_each_form_that_a_page_links_takes_its_values(
    published: list[Published], own: Mapping[str, DeploymentResponse], somebody: Operator
) -> None:
    """Every link leads to a deployment that exists, the one that it names, with valid values and no `confirm`; some are
    followed."""
    by_id, addresses = {str(one.id): (name, one) for name, one in own.items()}, set[str]()
    for page in (page for one in published for page in one.pages.values()):
        for text, address in links(page):
            if not (found := FORM.search(address)):
                continue
            addresses.add(address)
            name, there = by_id[found[1]]
            if (named := text.partition("/")[0]) in own:
                assert named == name
            values = given(address)
            require_valid(values, there.parameter_openapi_schema or {})
            assert "confirm" not in values
    assert len(addresses) > RUNBOOKS
    for address in random.Random(len(addresses)).sample(sorted(addresses), CLICKS):
        somebody.open(publish(f"# Report\n\n[the form]({address})"))
        somebody.page.get_by_role("link", name="the form").click()
        expect(somebody.form().text("environment")).to_have_value(given(address)["environment"])


def require_valid(values: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """As the server and the form check them; what is missing is filled in there."""
    assert set(values) <= set(schema["properties"]), "the form has no such field"
    validate(dict(values), dict(schema), raise_on_error=True, ignore_required=True)


def inline(page: str) -> Iterator[Token]:
    """Each token of the text, as the UI reads it."""
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(page):
        yield from token.children or []


def links(page: str) -> Iterator[tuple[str, str]]:
    """Text and target."""
    text, target = "", ""
    for token in inline(page):
        if token.type == "link_open":
            text, target = "", str(token.attrs["href"])
        elif token.type == "link_close":
            yield text, target
            target = ""
        elif target:
            text += token.content


def unlinked(page: str) -> Iterator[str]:
    """Texts that are no link, and code that is one word."""
    inside = printed = False
    for token in inline(page):
        inside = token.type == "link_open" or (inside and token.type != "link_close")
        printed = token.content == "<samp>" or (printed and token.content != "</samp>")
        is_text = token.type == "text" or (token.type == "code_inline" and " " not in token.content)
        if is_text and not inside and not printed:
            yield token.content
