"""What the lab's pages and forms say: in the language that a new lab has."""

from __future__ import annotations

import os
from typing import cast

from runbook.language.say import Language, label, use_language

LANGUAGE = cast(Language, os.environ.get("OPS_LAB_LANGUAGE", "en"))


def in_lab(text: str) -> str:
    """An English text of the sources as the lab's operators see it."""
    with use_language(LANGUAGE):
        return label(text)
