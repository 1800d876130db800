"""Everything that the documentation tells a reader to type: it is there, and takes what it is given.

A command that is none of these kinds fails until somebody has looked at it and put it into REVIEWED with a reason.
What needs a Prefect server or a lab is really run by `tests/stranger/test_guide.py` and the tests that it names.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from cyclopts import CycloptsError
from prefect.cli._app import _app as prefect_cli
from prefect.settings import Settings

from blocks.config import toml
from flows.launch import find_flow, parsed
from flows.recovery.drills.scenarios.declared import Declaration
from runbook.errors import OpsError
from tests.docs.commands import MADE, PAGES, ROOT, SHELL, Block, Command, blocks, commands, inline

READ = [path for path in PAGES if path.name not in MADE]
BLOCKS = [block for path in READ for block in blocks(path)]
# Not for a shell: what the page before it says it is.
TEXTS = {
    "docs/ai-providers.md": re.compile(r"INCR .*\nEXPIRE .*"),
    "docs/logs.md": re.compile(r"OWN = .*class JSONFormatter.*", re.DOTALL),
}
# Of a production host, or of another program's own documentation: looked at by a person.
REVIEWED = {
    "set -a; . /etc/interview-ops/secrets.env; set +a": "a file of the reader's own",
    "set -a; . deployments/environments/prefect.env; set +a": "as tests/stranger/test_guide.py types it",
    (
        "(umask 077; python -c 'import secrets; print(\"PREFECT_API_AUTH_STRING=ops:\" + secrets.token_hex(24))' "
        "| tee deployments/environments/prefect.env)"
    ): "as tests/stranger/test_guide.py types it",
    "cd interview-ops": "after the clone",
    "python -c 'import pyotp; print(pyotp.random_base32())'": "as tests/routine/test_approval.py calls it",
    'python -X importtime -c "import NAME"': "Python's own option",
    "pip check": "told of as what the flow does",
    "pip install pip-audit": "told of as what the manual does",
    "pip list --outdated": "told of as what the manual does",
    "OPS_TEST_POSTGRES=16 pytest …": "a variable of tests/fixtures/servers.py",
    "pip install 'interview-ops[load]'": "an extra of pyproject.toml",
    "python -m flows.launch …": "tests/troubleshooting/test_launch.py",
    "install -d -m 700 /etc/interview-ops": "a directory of the reader's own",
    "PREFECT_API_WORKERS=2": "a variable of deployments/compose.yaml",
    "systemctl stop interview-ops-worker": "the unit is deployments/worker.service",
    "systemctl daemon-reload && systemctl enable --now interview-ops-worker": "the unit is deployments/worker.service",
    "systemctl daemon-reload && systemctl enable --now interview-ops-watcher": "the unit is deployments/watcher.service",
}
OURS = re.compile(r"OPS_[A-Z_]+")
VARIABLE = re.compile(r"[A-Z][A-Z_]{4,}")


def is_shell(block: Block) -> bool:
    own = TEXTS.get(block.page)
    return block.language in SHELL or (
        not block.language and not block.is_toml and not (own and own.fullmatch(block.text))
    )


TYPED = [line for block in BLOCKS if is_shell(block) for line in commands(block)]
MENTIONED = [line for path in READ for line in inline(path)]
EACH = {one.text: one for one in [*MENTIONED, *TYPED]}


class Parsed(BaseException):
    """The command line was understood; nothing was done."""


def test_there_are_commands() -> None:
    assert len(TYPED) > 8, "a reader of the documentation finds something to type"
    assert len(EACH) > 20


@pytest.mark.parametrize("line", EACH.values(), ids=lambda line: f"{line.where} {line.text}")
def test_a_command_is_there_and_takes_what_it_is_given(line: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, monkeypatch)


def check(line: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.text.partition("#")[0].strip() in REVIEWED or line.words[1:2] == ("=",):  # a line of a TOML
        return
    for name, _ in line.variables:
        assert is_variable(name), f"nothing reads {name}"
    if not line.words:
        return
    if line.program == "make":
        made(line.words[1:])
    elif line.words[:3] == ("python", "-m", "flows.launch"):
        parsed(find_flow(line.words[3]), line.words[4:])
    elif line.words[:2] == ("python", "-m"):
        run_module(line.words[2], line.words[3:], monkeypatch)
    elif line.program == "prefect":
        prefect(line.words[1:])
    elif line.program == "export":
        assert all(is_variable(word.partition("=")[0]) for word in line.words[1:])
    elif line.program == "cp":
        assert (ROOT / line.words[1]).exists()
        assert (ROOT / line.words[2]).parent.exists()
    elif line.program == "install" and line.words[-2] != "/dev/null":
        assert (ROOT / line.words[-2]).exists()
    elif line.program == "install":
        assert line.words[-1].startswith("/etc/interview-ops/")
    elif line.program == "docker":  # tests/system/test_compose.py does what they do
        assert all((ROOT / word).exists() for word in line.words if word.startswith("deployments/"))
    elif line.program == "git" and line.words[1] == "clone":
        assert line.words[-1].endswith("interview-ops.git") or line.words[-1] == "interview-ops"
    elif line.program == "." or line.program == "source":
        assert line.words[1] == ".venv/bin/activate"
    else:
        pytest.fail(f"nobody has looked at “{line.text}” yet")


def is_variable(name: str) -> bool:
    """One that Prefect knows, or that this project's own code reads."""
    if name.startswith("PREFECT_"):
        return name in prefect_variables()
    return name in our_variables()


def prefect_variables(model: Any = Settings, found: frozenset[str] = frozenset()) -> set[str]:
    """The environment variables of all of Prefect's settings."""
    names = set(found)
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            names |= prefect_variables(field.annotation)
        prefix = str(model.model_config.get("env_prefix", "PREFECT_")).upper()
        names |= {f"{prefix}{name.upper()}", *(str(alias).upper() for alias in aliases(field.validation_alias))}
    return names


def aliases(alias: Any) -> Iterator[Any]:
    yield from getattr(alias, "choices", [alias] if isinstance(alias, str) else [])


@functools.cache
def our_variables() -> set[str]:
    """What our sources, the environments and prefect.yaml name."""
    found = set()
    for folder in ("runbook", "blocks", "tasks", "flows", "deployments", "lab", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".yaml") and path.parent.name != "docs":
                found |= set(VARIABLE.findall(path.read_text(encoding="utf-8")))
    return found | set(VARIABLE.findall((ROOT / "prefect.yaml").read_text(encoding="utf-8")))


def made(words: tuple[str, ...]) -> None:
    """The Makefile has the target, and reads every variable that is set. Not by `make -n`, which runs recursive lines."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([\w -]+):", makefile, re.MULTILINE) for name in line.split()}
    words = words[2:] if words[0] == "-C" else words
    asked = [word for word in words if "=" not in word]
    assert asked, "make alone brings the lab up"
    assert set(asked) <= targets
    for name in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"\$\((if \$\()?{name}\)", makefile), f"make reads no {name}"


def run_module(module: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's command line up to the point where it was understood."""
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if not words:
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> Any:
        parse(parser, *given, **more)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def prefect(words: tuple[str, ...]) -> None:
    """Prefect's own command line understands it."""
    command, _, _ = prefect_cli.parse_args(
        [word for word in words if word != "--no-prompt"], exit_on_error=False, print_error=False
    )[:3]
    assert callable(command)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.is_toml], ids=lambda block: block.name)
def test_a_part_of_an_environment_is_understood(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of that part of production's, it is an environment."""
    content = tomllib.loads((ROOT / "deployments" / "environments" / "production.toml").read_text(encoding="utf-8"))
    given = tomllib.loads(block.text)
    if "fault" in given:  # the file of a declared drill
        assert Declaration.model_validate(given).detected_by
        return
    content |= given
    path = tmp_path / "production.toml"
    path.write_text(as_toml(content), encoding="utf-8")
    for name in OURS.findall(path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "SECRET" * 4)  # base32 too
    assert toml.read(path).name == "production"


def as_toml(content: Mapping[str, Any]) -> str:
    """Tables of texts, numbers, lists and tables of those, as TOML: what is in a table is written in one line."""
    return "\n".join(f"{json.dumps(key)} = {_value(value)}" for key, value in content.items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_value(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        "make nothing-like-that",
        "make drill SCENARI=x",
        "python -m flows.recovery.optionss",
        "python -m flows.recovery.objectives.options --enviroment production",
        "prefect work-pool create production --typ process",
        "prefect wrk-pool create production",
        "rm -rf /",
        "PREFECT_NOT_THERE=1",
        "python -m flows.launch restore-databas environment=production",
        "python -m flows.launch restore-redis enviroment=x",
        "OPS_NOT_THERE=1",
        "export OPS_NOT_HERE=2",
    ],
)
def test_that_check_sees_what_is_wrong(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.docs.commands import command

    with pytest.raises((AssertionError, SystemExit, CycloptsError, OpsError, pytest.fail.Exception)):
        check(command("here", text), monkeypatch)


def test_a_wrong_key_in_a_block_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Block("here", 1, "", '[backups]\npostgres = "/a"\nredis = "/b"\nfiles = "/c"\nspol = "/d"')
    with pytest.raises(OpsError, match="spol"):
        test_a_part_of_an_environment_is_understood(wrong, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", [path for path in READ if path.suffixes == [".ja", ".md"]], ids=lambda page: page.name)
def test_a_japanese_page_has_the_same_commands(page: Path) -> None:
    english = page.with_name(page.name.replace(".ja.md", ".md"))
    if page.parent == ROOT:  # comments behind its commands are translated
        assert [told(block) for block in blocks(page)] == [told(block) for block in blocks(english)]
    else:
        assert [block.text for block in blocks(page)] == [block.text for block in blocks(english)]


def told(block: Block) -> list[tuple[str, ...]]:
    return [line.words for line in commands(block)]


def test_every_page_is_reached() -> None:
    """From the site's table of contents."""
    named = set(re.findall(r"[\w.-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named
