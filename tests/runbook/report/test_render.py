"""The page: Markdown that no content breaks, pictures that are XML, and a size that the UI takes."""

from __future__ import annotations

import base64
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from prefect.settings import PREFECT_UI_URL, temporary_settings

from runbook.next import Next
from runbook.page import render, timeline
from runbook.page.form import Forms
from runbook.page.markdown import code, escaped, fenced, link, plain
from runbook.page.width import fit
from runbook.report import Evidence, Report, Status, StepTime

NASTY = [
    "a|b",
    "a\\|b",
    "\\",
    "a\\",
    "<script>x</script>",
    "a & b &lt;",
    "one\ntwo",
    "`a|b`",
    "|" * 5,
    "候補者 <名前>",
    "![x](http://evil/p.png)",
    "[log in](http://evil)",
    "[a]: http://evil",
    "*a* _b_ ~~c~~",
    "```",
    "a ` ![x](y) `b",
    "\\[x](y)",
    "<http://evil>",
    "[[x](y)](z)",
    "![x][a]",
]


def new() -> Report:
    return Report("Full restore", "production", limits={})


def cells(text: str) -> list[list[str]]:
    """Every table's cells, as a Markdown reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    rows: list[list[str]] = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


@pytest.mark.parametrize("text", NASTY)
def test_a_cell_is_shown_as_it_is_whatever_is_in_it(text: str) -> None:
    rows = cells(render.table(("name", "value"), [(text, "behind"), ("next", "row")]))
    shown = text.replace("\n", " ")
    if "`" not in text:
        assert rows[1][0] == shown
    assert rows[1][1] == "behind", "it did not end its cell early"
    assert rows[2] == ["next", "row"], "nor its row"


@pytest.mark.parametrize("shown", [str, fit])
def test_no_content_becomes_html(shown: Callable[[str], str]) -> None:
    """In the file, and in the page that fits a phone."""
    report = new()
    for text in NASTY:
        report.warn(text, text, value=text)
        report.fact(text, text)
    report.table("Rows", NASTY, [NASTY])
    report.attach(Evidence(" ".join(NASTY), text="\n\n".join(map(fenced, NASTY))))
    report.plan(*NASTY[-2:])
    tokens = MarkdownIt("commonmark").enable("table").parse(shown(render.markdown(report)))
    inline = [child for token in tokens for child in token.children or []]
    html = [token.content for token in [*tokens, *inline] if token.type in ("html_block", "html_inline")]
    assert [text for text in html if "script" in text] == []
    own = {"em_open", "link_open"} if shown is fit else set()  # names of joined columns, and what the UI would link
    assert {token.type for token in inline} & {"link_open", "image", "em_open", "s_open"} <= own
    links = [(one.attrs["href"], text.content) for one, text in itertools.pairwise(inline) if one.type == "link_open"]
    assert all(address == text for address, text in links)
    strong = [token for token in inline if token.type == "strong_open"]
    assert len(strong) == len(NASTY) + 1, "“do” of each finding, and “do now”"
    assert sum(token.type == "heading_open" and token.tag == "h3" for token in tokens) == len(NASTY)
    made = {text.strip().split(">")[0].lstrip("</") for text in html}
    assert made - {"samp", "br"} == {"details"}, "no finding made any"


@pytest.mark.parametrize("text", [*NASTY, "````\n![x](y)\n`````", "~~~\n# a"])
def test_a_block_of_code_ends_where_its_text_ends(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(fenced(text, "diff") + "\n\nbehind")
    assert [(token.type, token.content) for token in tokens if token.content] == [
        ("fence", text + "\n"),
        ("inline", "behind"),
    ]
    one_line = " ".join(text.split())
    (inline,) = [token for token in MarkdownIt("commonmark").parse(f"a {code(text)} b") if token.type == "inline"]
    assert [child.content for child in inline.children or [] if child.type == "code_inline"] == [one_line]
    assert plain(escaped(text)) == text


def test_only_our_own_links_are_links() -> None:
    ours = link("restore [x]/production", "http://prefect/v2/run?parameters=%7B%7D")
    tokens = MarkdownIt("commonmark").parse(escaped(f"see {ours}, not [this](http://evil)"))
    found = [child.attrs["href"] for token in tokens for child in token.children or [] if child.type == "link_open"]
    assert found == ["http://prefect/v2/run?parameters=%7B%7D"]


def test_nobody_builds_a_fence_by_hand() -> None:
    """A log with three backticks in it would end it."""
    root = Path(__file__).parents[3]
    sources = [path for layer in ("runbook", "tasks", "flows") for path in (root / layer).rglob("*.py")]
    assert [path.name for path in sources if "```" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (426_000_000, "426.0 MB"), (3.2e12, "3.20 TB"), (-2000, "-2.0 kB")],
)
def test_bytes_for_people(number: float, text: str) -> None:
    assert render.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 00 s"),
        (60, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (14400, "4 h 00 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


def test_the_key_is_the_artifact_s() -> None:
    report = Report("Full restore (drill) — 復旧", "x")
    assert render.key(report) == "full-restore-drill"


def with_steps(count: int, name: str = "dump") -> Report:
    report = new()
    for number in range(count):
        started = report.started + timedelta(seconds=number)
        report.add_step(StepTime(f"{name}_{number}", started, 1.5 + number % 7, list(Status)[number % 4]))
    return report


@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_timeline_is_well_formed_and_inside_its_frame(count: int) -> None:
    report = with_steps(count, "a<b>&\"'候補")
    root = ElementTree.fromstring(timeline.timeline(report))  # noqa: S314 - our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    bars = root.findall("{*}rect")[1:]  # on a card
    assert len(bars) == count
    for bar in bars:
        assert float(bar.attrib["x"]) >= timeline.LEFT
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
        assert float(bar.attrib["y"]) + 16 <= height
    texts = [element.text for element in root.findall("{*}text")]
    assert [text for text in texts if text and text.startswith("a<b>")] == [step.name for step in report.steps]


def test_pictures_are_in_the_page() -> None:
    report = with_steps(3)
    report.attach(Evidence("growth", text="_by day_", svg="<svg/>", columns=("day",), rows=(("1",),)))
    page = render.markdown(report)
    pictures = re.findall(r"!\[(\w+)\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", page)
    assert [name for name, _ in pictures] == ["growth", "steps"]
    assert base64.b64decode(pictures[0][1]) == b"<svg/>"
    assert base64.b64decode(pictures[1][1]).decode() == timeline.timeline(report)
    assert "_by day_" in page


def test_the_page_has_everything_worst_first() -> None:
    report = new()
    report.passed("rows", value=3, expected=3)
    report.warn("fsync", "switch it on")
    report.fail("backup", "take one", value="none", expected="one")
    report.fact("size", "3 MB")
    report.hash, report.previous = "h" * 64, "p" * 64
    page = render.markdown(report)
    assert page.startswith("# 🛑 Full restore · production · CRITICAL\n\nCRITICAL: backup")
    assert "\n- **do now:** take one\n" in page
    blocks = "### 🛑 backup\n- none\n- expected: one\n- **next step:** take one\n\n### ⚠️ fsync\n- **next step:** switch it on\n"
    assert blocks in page
    rows = cells(page)
    assert ["rows", "3", "3"] in rows, "what passed is in a table"
    assert ["size", "3 MB"] in rows
    assert page.index("do now") < page.index("🛑 backup") < page.index("⚠️ fsync") < page.index("3 MB")
    assert report.hash in page
    assert report.previous in page


def test_a_plan_says_how_to_carry_it_out() -> None:
    report = new()
    report.plan("swap", "grc_db", size=3_000_000, seconds=90)
    report.plan("start", "grc-backend")
    report.planned = True
    report.form = "http://prefect/v2/deployments/deployment/1/run?parameters=%7B%7D"
    page = render.markdown(report)
    assert ["1", "swap", "grc_db", "3.0 MB", "1 min 30 s"] in cells(page)
    assert ["2", "start", "grc-backend", "", ""] in cells(page)
    assert f"open [the form]({report.form}), type `production` in `confirm`" in page


def test_ten_thousand_of_everything_stay_under_a_megabyte() -> None:
    report = with_steps(10_000)
    rows = tuple((str(n), f"user {n}", "候補者" * 1000) for n in range(10_000))
    report.attach(Evidence("Rows", ("id", "name", "text"), rows))
    for number in range(10_000):
        report.warn(f"row {number}", "look at it", value=number)
    report.fail("the worst", "do something")
    page = render.markdown(report)
    assert len(page.encode()) < 1_000_000
    assert page.count("… 9800 more rows in the JSON report") == 2, "rows and steps"
    assert page.count("… 9801 more findings in the JSON report") == 1
    assert "the worst" in page
    assert len(report.as_json()["evidence"][0]["rows"]) == 10_000, "the JSON keeps them all"


def test_a_runbook_to_follow_is_a_link_to_its_form_and_a_command_where_prefect_does_not_know_it() -> None:
    report = new()
    report.warn("memory", "free some", follow=[Next("clear-cache", "delete caches", {"prefixes": ["a" * 400]})])
    known = Forms({("clear-cache", "production"): "1f3a"})
    with temporary_settings({PREFECT_UI_URL: "http://ui:4200"}):
        assert "free some. delete caches: [clear-cache/production](http://ui:4200/deployments/" in render.markdown(
            report, known
        )
    assert "`python -m flows.launch clear-cache environment=production" in render.markdown(report)


def test_each_runbook_that_a_page_names_is_a_link_to_its_form() -> None:
    """In a hint, a value, a fact, a table and between Japanese words; a command, a file and another environment's
    runbook stay text."""
    report = new()
    report.warn(
        "age", "run backup-redis, then `undo-backup-redis`; flows/backup-redis.py, backup-redis.md and stay-put"
    )
    report.passed("before", value="次にbackup-redisを実行")
    report.fact("undo", "undo-backup-redis/production")
    report.table("Next", ["what", "by"], [["copy", "backup-redis"]])
    report.attach(Evidence("Log", text=fenced("backup-redis\nlaunched") + "\n\n`prefect run backup-redis/production`"))
    known = Forms(
        {("backup-redis", "production"): "1f3a", ("undo-backup-redis", "production"): "2b", ("stay-put", "lab"): "3c"}
    )
    with temporary_settings({PREFECT_UI_URL: "http://ui:4200"}):
        page = render.markdown(report, known)
    form = "(http://ui:4200/deployments/deployment/{}/run?parameters=%7B%22environment%22%3A+%22production%22%7D)"
    run, undo = f"[backup-redis]{form.format('1f3a')}", form.format("2b")
    assert f"run {run}, then [`undo-backup-redis`]{undo}; flows/backup-redis.py, backup-redis.md and stay-put" in page
    assert f"次に{run}を実行" in page
    assert f"| undo | [undo-backup-redis/production]{undo} |" in page
    assert f"| copy | {run} |" in page
    assert "\nbackup-redis\nlaunched" in page
    assert "`prefect run backup-redis/production`" in page
