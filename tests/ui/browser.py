"""A real headless Chromium in the hands of an operator who knows only what the Prefect UI shows.

Chromium and its fonts are Debian's (`tests/system/install`); Playwright brings none, it only drives. Every step is found
by its role and its text, as a person finds it, and waits for what it needs to see.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
from playwright.sync_api import Locator, Page, Response, TimeoutError, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# As root, without a GPU, and without asking the world for anything of Chromium's own.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 120
SIZE = {"width": 1280, "height": 860}
MOST_BYTES = 240_000

expect.set_options(timeout=SECONDS * 1000)
LIVE_MILLISECONDS = 20_000


@dataclass
class Operator:
    """Somebody in front of the UI."""

    page: Page
    address: str
    environment: str
    pictures: Path
    strangers: set[str] = field(default_factory=set)
    """Other hosts that the UI asked for something. None of them was reached."""

    def open(self, path: str) -> None:
        self.page.goto(path if path.startswith("http") else f"{self.address}{path}")

    def refused(self, address: str) -> None:
        if urlsplit(address).netloc != urlsplit(self.address).netloc:  # what leaving a page cuts short is no stranger
            self.strangers.add(urlsplit(address).hostname or "")

    def tagged(self, *tags: str) -> Locator:
        """The environment's deployments that have all of these tags; other environments' are listed beside them."""
        self.open(f"/deployments?limit=100&tags={quote(json.dumps(tags, ensure_ascii=False))}")
        own = self.page.get_by_role("link", name=self.environment, exact=True)
        rows = self.page.locator("tbody tr").filter(has=own)
        expect(rows.first).to_be_visible()
        return rows

    def choose(self, flow: str, *tags: str) -> None:
        """A deployment's page, by its tags and its flow's name."""
        row = self.tagged(*tags).filter(has=self.page.get_by_text(flow, exact=True))
        row.get_by_role("link").first.click()
        expect(self.page.get_by_role("main").get_by_role("link", name=flow).first).to_be_visible()

    def describe(self) -> str:
        """What the tab Description says."""
        self.page.get_by_role("tab", name="Description").click()
        shown = self.page.get_by_role("tabpanel", name="Description")
        expect(shown.locator("p").first).to_be_visible()
        return shown.inner_text()

    def custom_run(self) -> Form:
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Custom run").click()
        return self.form()

    def form(self) -> Form:
        expect(self.page.get_by_role("button", name="Submit")).to_be_visible()
        form = Form(self.page, self.page.locator("form"))
        expect(form.root.get_by_role("group").first).to_be_visible()
        return form

    def submit(self) -> str:
        """Launches what the form says; the run's page is open then. Its id."""
        run = taken(self.page, self.page.get_by_role("button", name="Submit"), "create_flow_run").json()
        message = self.page.get_by_role("region", name="Notifications").get_by_role("listitem")
        try:
            message.filter(has_text=run["name"]).get_by_role("link", name="View run").click(timeout=LIVE_MILLISECONDS)
        except TimeoutError:  # the message disappears after some seconds: on a busy machine, before it is reached
            self.open(f"/runs/flow-run/{run['id']}")
        self.page.wait_for_url(re.compile(run["id"]))
        return str(run["id"])

    def state(self, *states: str) -> None:
        """Wait for a run's badge, on its page that is open; it changes there by itself.

        The address changes before the page does: without its tab Logs, which a deployment's page has not, the badge
        could be the one of an earlier run in the deployment's list.
        """
        expect(self.page.get_by_role("tab", name="Logs")).to_be_visible()
        badge = self.page.get_by_role("main").get_by_text(re.compile(f"^({'|'.join(states)})$"))
        expect(badge.first).to_be_visible()

    def log(self, text: str | re.Pattern[str]) -> Locator:
        """A line of the run's log."""
        self.page.get_by_role("tab", name="Logs").click()
        line = self.page.get_by_role("log").get_by_role("listitem").filter(has_text=text)
        try:
            expect(line.first).to_be_visible(timeout=LIVE_MILLISECONDS)
        except AssertionError:  # the page asks for no more lines when the run has ended; the last come after that
            self.page.reload()
            self.page.get_by_role("tab", name="Logs").click()
            expect(line.first).to_be_visible()
        return line.first

    def report(self, key: str) -> Locator:
        """The report of the run whose page is open, by the run's tab Artifacts; opened."""
        self.page.get_by_role("tab", name="Artifacts").click()
        link = (
            self.page.get_by_role("tabpanel")
            .get_by_role("link")
            .filter(has=self.page.get_by_role("heading", name=key, exact=True))
        )
        link.first.click()
        self.page.wait_for_url(re.compile("/artifacts/artifact/"))
        shown = self.page.get_by_role("tabpanel", name="Artifact")
        expect(shown.get_by_role("heading", level=1)).to_be_visible()
        return shown

    def resume(self) -> Form:
        """What a run that waits for people asks, on its page that is open."""
        self.page.get_by_role("main").get_by_role("button", name="Open menu").first.click()
        self.page.get_by_role("menuitem", name="Resume").click()
        asked = self.page.get_by_role("dialog")
        expect(asked.get_by_role("group").first).to_be_visible()
        return Form(self.page, asked)

    def plots(self) -> dict[str, int]:
        """The pictures of the report that is open, and how wide each one really is (0: not drawn)."""
        shown = "[...document.querySelectorAll('[data-testid=markdown-display] img')]"
        self.page.wait_for_function(f"{shown}.every(image => image.complete)")
        return dict(self.page.evaluate(f"{shown}.map(image => [image.alt, image.naturalWidth])"))

    def picture(self, name: str, height: int = SIZE["height"]) -> Path:
        """A screenshot for the README: `make screenshots` keeps them."""
        self.page.set_viewport_size({**SIZE, "height": height})
        self.page.mouse.move(SIZE["width"] // 2, 2)  # a message under the mouse would stay
        expect(self.page.get_by_role("region", name="Notifications").get_by_role("listitem")).to_have_count(0)
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=path, animations="disabled", caret="hide")
        self.page.set_viewport_size(SIZE)  # type: ignore[arg-type]
        assert path.stat().st_size < MOST_BYTES, f"{path} is too large for a README"
        return path


@dataclass(frozen=True)
class Form:
    """A form with one field for each parameter."""

    page: Page
    root: Locator

    def parameter(self, name: str) -> Locator:
        """A parameter's field, found by its label."""
        label = re.compile(rf"^{re.escape(name)}( \(Optional\))?$")
        return (
            self.root.locator("fieldset, div")
            .filter(has=self.page.get_by_text(label))
            .filter(has=self.page.get_by_role("group"))
            .last
        )

    def text(self, name: str) -> Locator:
        return self.root.get_by_role("textbox", name=re.compile(rf"^{re.escape(name)}( \(Optional\))?$"))

    def switch(self, name: str) -> Locator:
        return self.root.get_by_role("switch", name=re.compile(rf"^{re.escape(name)}( \(Optional\))?$"))

    def choices(self, name: str) -> list[str]:
        """What a drop-down offers; closed again."""
        with self._offered(self._drop_down(name)) as options:
            offered = options.all_inner_texts()
            self.page.keyboard.press("Escape")
        return offered

    def choose(self, name: str, choice: str) -> None:
        with self._offered(self._drop_down(name)):
            self._take(choice)

    def choose_each(self, name: str, choice: str) -> int:
        """The same in every drop-down of that name; how many there are."""
        every = self.root.get_by_role("button", name=f"Select {name}")
        for one in every.all():
            with self._offered(one):
                self._take(choice)
            expect(one).to_contain_text(choice)
        return every.count()

    def resume(self) -> None:
        """Sends what a run that waits for people asked."""
        taken(self.page, self.root.get_by_role("button", name="Resume", exact=True), "resume")
        expect(self.root).to_be_hidden()

    def _drop_down(self, name: str) -> Locator:
        return self.parameter(name).get_by_role("group").get_by_role("button").first

    @contextmanager
    def _offered(self, drop_down: Locator) -> Iterator[Locator]:
        """What a drop-down offers while it is open.

        One that closes gives the focus back to its button a moment later; the next one, opened before that, would lose
        the focus by it and close under the operator's hand.
        """
        options = self.page.get_by_role("option")
        drop_down.click()
        expect(options.first).to_be_visible()
        yield options
        expect(options).to_have_count(0)
        expect(drop_down).to_be_focused()

    def _take(self, choice: str) -> None:
        self.page.get_by_role("option", name=choice, exact=True).click()

    def add(self, name: str, value: str) -> None:
        """One more item of a list."""
        field = self.parameter(name)
        field.get_by_role("button", name="Add item").click()
        field.get_by_role("textbox").last.fill(value)


def taken(page: Page, button: Locator, path: str) -> Response:
    """What the server answers to a button, pressed again where it was too busy: SQLite under load, and the UI says so."""
    asked = re.compile(f"/{path}$")
    while True:
        with page.expect_response(lambda got: bool(asked.search(got.url))) as answer:
            button.click()
        if answer.value.status != httpx.codes.SERVICE_UNAVAILABLE:
            return answer.value


def given(address: str) -> dict[str, Any]:
    """The parameters that a form's address fills in."""
    (filled,) = parse_qs(urlsplit(address).query)["parameters"]
    return dict(json.loads(filled))


@contextmanager
def operator(address: str, environment: str, pictures: Path, auth: str) -> Iterator[Operator]:
    """Chromium with an empty profile but for the log-in, in Tokyo, that reaches nothing but the Prefect server."""
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(address))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        context = chromium.new_context(viewport=SIZE, locale="ja-JP", timezone_id="Asia/Tokyo")  # type: ignore[arg-type]
        context.set_default_timeout(SECONDS * 1000)
        login = b64encode(auth.encode()).decode()  # as the UI keeps what a person typed into it
        context.add_init_script(f"localStorage.setItem('prefect-password', '{login}')")
        page = context.new_page()
        somebody = Operator(page, address, environment, pictures)
        page.context.route(lambda url: not url.startswith((origin, "data:", "blob:")), lambda route: route.abort())
        page.on("requestfailed", lambda request: somebody.refused(request.url))
        yield somebody
        chromium.close()
