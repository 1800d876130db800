"""What the lab's pages and forms say: in the language of its TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path

from runbook.language.say import Language, label, use_language

TOML = Path(__file__).resolve().parents[2] / "deployments" / "environments" / "lab.toml"
LANGUAGE: Language = tomllib.loads(TOML.read_text(encoding="utf-8")).get("language", "en")


def in_lab(text: str) -> str:
    """An English text of the sources as the lab's operators see it."""
    with use_language(LANGUAGE):
        return label(text)
