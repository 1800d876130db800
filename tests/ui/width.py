"""How wide the page in a browser is."""

from __future__ import annotations

from playwright.sync_api import Page

WIDTHS = (1440, 390)
HEIGHT = 900
_WIDER = """() => {
    for (const one of document.querySelectorAll("details")) one.open = true
    const shown = document.querySelector("[data-testid=markdown-display]") ?? document.querySelector("[role=tabpanel]")
    const edge = Math.min(window.innerWidth, shown.getBoundingClientRect().left + shown.clientWidth)
    const scrolls = (one) => one.scrollWidth > one.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(one).overflowX)
    const heading = (one) => [...shown.querySelectorAll("h1")].filter((each) => 2 & one.compareDocumentPosition(each))
    const found = [...shown.querySelectorAll("*")]
        .filter((one) => !one.closest("svg") && (one.getBoundingClientRect().right > edge + 1 || scrolls(one)))
        .map((one) => `${heading(one).at(-1)?.textContent}: ${one.tagName} ${one.textContent.slice(0, 80)}`)
    const around = [document.documentElement, ...document.querySelectorAll("main")]
        .filter((one) => one.scrollWidth > one.clientWidth + 1)
        .map((one) => `${one.tagName} scrolls ${one.scrollWidth} in ${one.clientWidth}`)
    return [around, found.slice(0, 30)]
}"""


def too_wide(page: Page, width: int, *, around: bool = True) -> list[str]:
    """What a reader would have to scroll sideways for, in a window of so many pixels; everything folded is unfolded.
    `around`: also what Prefect shows next to our text, and the window itself."""
    page.set_viewport_size({"width": width, "height": HEIGHT})
    windows, found = page.evaluate(_WIDER)
    return [*(windows if around else ()), *found]
