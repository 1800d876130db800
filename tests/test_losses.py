"""A loss is stated by one module: no other code of a recovery says in its own words what is lost, or that nothing is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT / "runbook" / "guard" / "loss.py"
SOURCES = [path for layer in ("flows", "tasks", "runbook") for path in sorted((ROOT / layer).rglob("*.py"))]
# Words for all or nothing, for a figure, and for the name of one. Each is searched in one sentence.
WHOLE = r"\b(nothing|everything|every|all|none|no)\b[^.,;:]*\b(is|are|was|were|be) lost\b"
OTHER = r"\bloses? (nothing|no|none|everything|all)\b|\blost: no\b|\blost none\b|\b(would|will) be lost\b"
LOST = r"\b(lost|loses?)\b"
COUNTED = r"(\{\}|\d|\bat most\b|\bup to\b)"
NAME = r"\bwrites? (that may be |certainly )?lost\b|\blost (acknowledged )?writes?\b"
STATED = re.compile(
    rf"{WHOLE}|{OTHER}|{COUNTED}[^.;:]*{LOST}|{LOST}[^.;:]*{COUNTED}|\w+ that are lost|\b(loses?|losing)\b.*\bloses?\b|{NAME}",
    re.IGNORECASE,
)
RECOVERIES = re.compile(r"rank=\"recovery\"")


# Texts that state no loss of a recovery.
DELETION = {  # on request: a migration, a cleaning or a release deletes it, and a person is asked with the exact list
    *("rows that are lost", "columns that are lost", "data of {} is lost", "the data of {} is lost"),
    *("{} rows would lose data now, {} were accepted", "{} would be lost: {}"),
}
NO_DATA = {  # a session, a slot, a server or a file is lost, not a write
    *("slot {} has lost it: max_slot_wal_keep_size was reached", "the copy of the previous release, {}, has lost {}"),
    "start it and run this again: it continues. If {} is lost for good",
    "Sentinel {} has lost its {} and refuses SENTINEL SET for it: add “sentinel {} {} {}” to its configuration file, "
    "and restart it",
    "none lost in {} tables",  # the rows of Prefect's own tables, counted before and after its migration
}
ADVICE = {  # hints: what a setting or a step risks, and no figure of a loss that happened
    "take backups more often, or copy them at once: losing this site loses that much data",
    "connect a standby or archive WAL: until then losing this host loses every write since the newest backup",
    "start the standby or the receiver that does not stream: until then, losing the primary loses writes",
    "keep save or appendonly: otherwise a kill or a restart loses all data",
    "during a rewrite there is no fsync: a crash can lose 30 s",
    "take backups with backup-database more often: every write since pg_dump started is lost",
    "run REPLICAOF {} on the other: until then it takes writes that will be lost",
    "start it, or stop it for good: otherwise clients' writes to it would be lost",
    "check what else writes to the disk: it is too slow for the AOF, clients wait, and a crash can lose 2 s",
}
LEDGERS = {  # counted by clients' ledgers and logs, to which the Loss is compared; goals of the manual's drills
    *("{} of {} lost, {}", "lost acknowledged writes", "lost writes", "writes lost"),
    *("Writes lost, by kind", "Writes lost, one by one{}"),
    *("No data is lost (RPO: 0); every function works", "a kill now would lose {}"),
    "The files are the previous release's and every function works; no data is lost",
}
EVIDENCE = {  # names of facts besides the Loss: the offsets, the loads and the counts behind it
    *("acknowledged writes lost", "acknowledged writes lost, at most", "acknowledged writes certainly lost"),
    *("acknowledged writes lost, at most, at the last known load", "acknowledged writes that may be lost"),
    "no acknowledged write lost before",
}
REFUSALS = {"Redis at {} {}: more would be lost than was confirmed"}  # of the gate itself
EXCEPTIONS = DELETION | NO_DATA | ADVICE | LEDGERS | EVIDENCE | REFUSALS


def texts_of(tree: ast.AST) -> Iterator[str]:
    """The texts of a module, without its docstrings: the values of an f-string are `{}`."""
    nodes = list(ast.walk(tree))
    documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (documented | parts):
            yield node.value


def stated_in(path: Path) -> list[str]:
    """The texts of a module that put a loss into words."""
    found = [text for text in texts_of(ast.parse(path.read_text(encoding="utf-8"))) if STATED.search(text)]
    return [text for text in found if text not in EXCEPTIONS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_code_puts_a_loss_into_words(path: Path) -> None:
    if path == WORDS:
        return
    assert not stated_in(path), "state it as a Loss"


@pytest.mark.parametrize(
    "text",
    [
        *("nothing is lost", "lost: no commit that the WAL has", "it serves 4,841 keys, and lost none"),
        *("everything would be lost: there is no copy", "{}: {} would be lost, RPO {}", "{} lost, by {}"),
        *("at most {} commits are lost", "up to {} lost: the time between two backups", "{} loses {}"),
        *("all backups are on this host, and would be lost with it", "acknowledged writes lost"),
        *("writes of the last {} are lost", "the writes that are lost here", "every later write is lost"),
    ],
)
def test_the_words_are_found(text: str) -> None:
    """Reports had them beside the gate's figure."""
    assert STATED.search(text)


def test_every_exception_is_still_in_the_sources() -> None:
    used = {text for path in SOURCES for text in texts_of(ast.parse(path.read_text(encoding="utf-8")))}
    assert used >= EXCEPTIONS, EXCEPTIONS - used


def test_a_recoverys_plan_states_its_loss_as_a_value() -> None:
    """`Effect` takes a clause for what a deletion takes away; whoever replaces live data gives a `Loss`."""
    found = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if not RECOVERIES.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Effect":
                lost = node.args[2] if len(node.args) > 2 else None
                lost = next((one.value for one in node.keywords if one.arg == "lost"), lost)
                if isinstance(lost, ast.JoinedStr) or (isinstance(lost, ast.Constant) and lost.value):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"these say in words what is lost: {found}"
