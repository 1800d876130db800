"""Numbers over time: what is over its limit is to be seen."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from runbook.page.plots import Trace, traces


def test_a_trace_shows_its_limit_and_what_is_over_it() -> None:
    lines = [
        Trace("host.cpu <1>", ((0.0, 0.2), (0.5, 0.95), (1.0, 0.4)), 0.8, "40 %"),
        Trace("nothing", ((0.5, 0.0),), 0.0, "0"),
        Trace("never measured", (), 1.0, "not measured"),
    ]
    svg = traces(lines)
    ElementTree.fromstring(svg)  # noqa: S314 - our own
    assert svg.count("<circle") == 1
    assert svg.count("stroke-dasharray") == 3
    assert "host.cpu &lt;1&gt;" in svg
    curve = re.findall(r'points="([^"]*)"', svg)[0].split()
    heights = [float(point.split(",")[1]) for point in curve]
    assert heights[1] < heights[2] < heights[0], "higher is further up"
