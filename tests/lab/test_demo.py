"""The demonstration, played on a lab of its own; and what must keep it from calling a restore proven."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest

from lab import demo as story
from lab.client import Lab
from lab.demo import Demo
from lab.progress import silent
from lab.proof import Proof


@pytest.fixture(scope="module")
def played() -> Iterator[tuple[Demo, Proof]]:
    lab = Lab.up(f"demo-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}", megabytes=3, runbooks=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(story, "BEFORE_SECONDS", 1.0)
            patch.setattr(story, "AFTER_SECONDS", 2.0)
            demo = Demo.on(lab.name, silent)
            yield demo, demo.play()
    finally:
        lab.down()


def test_the_restore_is_proven(played: tuple[Demo, Proof]) -> None:
    demo, proof = played
    assert proof.problems() == []
    assert proof.lost
    assert 10 < len(proof.lost.lost) < proof.lost.acknowledged
    assert proof.ledger.acknowledged(before=proof.backups_began)
    text = proof.text(demo.links(proof.run))
    for shown in ("Full restore on", "swap databases", "RTO:", "public.users", "/artifacts/artifact/"):
        assert shown in text
    lost, named = {attempt.key for attempt in proof.lost.lost}, proof._named()
    before = {attempt.key for attempt in proof.ledger.acknowledged(before=proof.backups_began)}
    assert lost <= named, "no lost write is missing in the report"
    # One that is logged while the snapshot is taken may be in the backup and named all the same; none from before it.
    assert not (named - lost) & before
    assert ("they agree, write by write" if lost == named else "logged just after the snapshot that holds them") in text


def test_what_keeps_it_from_being_proven(played: tuple[Demo, Proof]) -> None:
    _, proof = played
    findings = [item for item in proof.report["findings"] if item["name"] != "copy equal to the backup"]
    for broken, expected in (
        (replace(proof, run=replace(proof.run, state="FAILED", message="why")), "the flow run ended FAILED: why"),
        (replace(proof, report={**proof.report, "status": "CRITICAL"}), "the report says CRITICAL"),
        (replace(proof, report={**proof.report, "findings": findings}), "does not say “copy equal to the backup”"),
        (replace(proof, report={**proof.report, "evidence": []}), "writes are lost that the report does not name"),
        (replace(proof, health='503 {"database": "unreachable"}'), "not healthy: 503"),
        (replace(proof, lost=None), "cannot be asked"),
    ):
        assert any(expected in problem for problem in broken.problems()), expected


def test_a_write_from_before_the_backup_that_is_gone_is_noticed(played: tuple[Demo, Proof]) -> None:
    demo, proof = played
    victim = next(a for a in proof.ledger.acknowledged(before=proof.backups_began) if a.kind == "session")
    with psycopg.connect(demo.status["postgres"]["dsn"]) as connection:
        connection.execute("DELETE FROM interview_sessions WHERE id = %s", [victim.key])
    problems = replace(proof, lost=demo.count_lost()).problems()
    assert any(problem.startswith("1 of ") and "before the backup are not there" in problem for problem in problems)
