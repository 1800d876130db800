"""lint_code on real checkouts: ruff and ESLint, and what they repair on a branch."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.application.lint import lint_code
from runbook.errors import OpsError
from runbook.report import Report, Status
from tests.application.test_types import finding
from tests.fixtures.application.checkouts import NAME, Checkout, program, replace
from tests.fixtures.application.seeded import PYTHON_FILE, WEB_FILE, ill_type


@pytest.fixture
def sloppy(checkout: Checkout) -> Checkout:
    ill_type(checkout)
    manifest = checkout.web / "package.json"  # the real one builds first, which takes its time
    tests = next(line for line in manifest.read_text().splitlines() if '"test":' in line)
    manifest.write_text(replace(manifest.read_text(), tests, '    "test": "node --check eslint.config.js"'))
    checkout.commit("Tests that take no time")
    return checkout


def critical(**given: object) -> Report:
    from tests.application import test_types

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_types, "check_types", lint_code)
        return test_types.failed(**given)


def test_a_clean_checkout_passes_and_its_settings_are_told(checkout: Checkout) -> None:
    (checkout.web / ".eslintcache").write_text("[]")
    before = checkout.state()
    report = lint_code.fn(NAME)
    after = checkout.state()
    assert set(before) - set(after) == {"web/.eslintcache"}
    assert {name: before[name] for name in after} == after
    assert report.status is Status.OK
    assert report.facts["ESLint's cache"] == "deleted"
    assert [finding(report, name).split(" —")[0] for name in ("ruff", "ruff format", "eslint")] == [
        "OK: 0 errors, 0 warnings in 4 files",
        "OK: 0 errors, 0 warnings in 3 files",
        "OK: 0 errors, 0 warnings in 10 files",
    ]
    (settings,) = [kept for kept in report.evidence if kept.name == "Settings in force"]
    found = {row[:2]: row[2] for row in settings.rows}
    assert found["ruff", "linter.line_length"] == "120"
    assert "eqeqeq" in found["eslint", "rules enabled"]
    assert Path(found["eslint", "all of them"]).stat().st_size > 1000


def test_problems_are_found_and_repaired_on_a_branch_only(sloppy: Checkout) -> None:
    before = sloppy.state()
    report = lint_code.fn(NAME, fix=True)
    assert sloppy.state() == before
    assert report.status is Status.WARN
    rows = next(kept for kept in report.evidence if kept.name.startswith("Problems")).rows
    assert {(row[0].rpartition("/")[2], row[3]) for row in rows} == {
        ("wrong.py", "F401"),
        ("wrong.py", "B006"),
        ("wrong.py", "format"),
        ("wrong.ts", "eqeqeq"),
        ("wrong.ts", "no-var"),
        ("wrong.ts", "@typescript-eslint/no-explicit-any"),
    }
    (branch,) = [name for name in sloppy.branches() if name != "main"]
    assert "import os" not in sloppy.git("show", f"{branch}:{PYTHON_FILE}")
    assert "const y = x == 1" in sloppy.git("show", f"{branch}:{WEB_FILE}")
    assert sloppy.git("diff", "--name-only", f"main..{branch}").split() == [PYTHON_FILE, WEB_FILE]
    assert "-import os" in next(kept.text for kept in report.evidence if kept.name == "Diff")
    assert finding(report, "ruff after the fix").startswith("WARN: 1 errors")
    assert finding(report, "ruff format after the fix").startswith("OK")
    assert finding(report, "eslint after the fix").startswith("WARN: 2 errors")
    assert finding(report, "web tests").startswith("OK")
    assert "2 files repaired" in report.outcome
    assert "3 problems left" in report.outcome


def test_chosen_files_and_rules(sloppy: Checkout) -> None:
    report = lint_code.fn(NAME, tools=("ruff", "eslint"), python_rules=["F401", "E711"], web_rules=["no-console"])
    assert finding(report, "ruff").startswith("WARN: 1 errors")
    assert finding(report, "eslint").startswith("OK")
    assert lint_code.fn(NAME, files=["backend/grc_backend/settings.py"]).status is Status.OK
    with pytest.raises(OpsError):
        lint_code.fn(NAME, tools=("eslint",), files=["backend/grc_backend/settings.py"])
    unknown = critical(python_rules=["ZZZ999"], web_rules=["no-such-rule"], tools=("ruff", "eslint"))
    assert "ZZZ999" in finding(unknown, "ruff")
    assert "no-such-rule" in finding(unknown, "eslint")


@pytest.mark.parametrize(
    "text",
    ["exit 0", "echo garbage", 'case "$1" in --version) echo "ruff 1.0";; *) echo "[{}]"; exit 1;; esac'],
    ids=["silent", "garbage", "shapeless"],
)
def test_a_tool_that_gives_no_answer_is_no_pass(sources: Checkout, fake: Path, tmp_path: Path, text: str) -> None:
    environment = tmp_path / "trial.toml"
    environment.write_text(replace(environment.read_text(), 'python = "', 'python = "/nowhere'))
    program(fake / "ruff", text)
    program(sources.web / "node_modules/.bin/eslint", text)
    report = critical()
    for tool in ("ruff", "ruff format", "eslint"):
        assert finding(report, tool).startswith("CRITICAL: ")


@pytest.mark.soak
def test_what_breaks_the_tests_is_told(checkout: Checkout) -> None:
    """The branch is kept, to be looked at."""
    checkout.add("web/packages/ui/tests/failing.test.mjs", "var x = 1;\nif (x !== 2) {\n  throw new Error();\n}\n")
    report = critical(fix=True, tools=("eslint",))
    assert finding(report, "web tests").startswith("CRITICAL")
    assert len(checkout.branches()) == 2
