"""The site: built without a warning, and loading nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.commands import ROOT

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=["']?(?P<src>https?:[^"'\s>]+)"""
    r"""|<link\b[^>]*?\bhref=["']?(?P<href>https?:[^"'\s>]+)"""
)


def test_the_site_is_built_strictly_and_asks_nobody(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) > 20
    assert not any("unpkg.com" in page.read_text() for page in pages), "a script that loads its own way"
    asked = {(page.name, found.group()) for page in pages for found in LOADED.finditer(page.read_text())}
    assert asked == set()


def test_that_check_sees_what_is_loaded() -> None:
    assert LOADED.search('<link rel="stylesheet" href="https://fonts.googleapis.com/css">')
    assert LOADED.search("<script async src=https://cdn.example.com/a.js></script>")
    assert not LOADED.search('<a href="https://docs.prefect.io">Prefect</a>')


def test_links_of_the_readmes_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", path.read_text(encoding="utf-8"))):
            if not link.startswith(("http://", "https://", "#")):
                target = link.partition("#")[0]
                assert (path.parent / target).exists(), f"{path.name}: {link}"
