"""check_base_images and update_base_images where they cannot be; on a real engine: tests/system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.infrastructure.images.bases import check_base_images, update_base_images
from runbook.errors import RunbookFailed

FLOWS: tuple[Callable[[], object], ...] = (
    lambda: check_base_images.fn("trial"),
    lambda: update_base_images.fn("trial", to=("python:3.12",)),
)


@pytest.mark.parametrize("run", FLOWS, ids=["check", "update"])
def test_a_checkout_that_is_none(run: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trial.toml"
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))
    text = f'name = "trial"\nreports = "{tmp_path}"\n[objectives]\nrpo = "1h"\nrto = "1h"\n[services]\nnames = {{}}\n[docker]\n'
    for checkout, said in (
        ("", "names no checkout"),
        (tmp_path / "gone", "does not exist"),
        (tmp_path, "not a usable git checkout"),
    ):
        path.write_text(f'{text}checkout = "{checkout}"\n')
        with pytest.raises(RunbookFailed, match=said):
            run()
