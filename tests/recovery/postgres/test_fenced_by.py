"""Who may attest a fence: a person whom the environment names. Other texts are refused, and the names are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.config import toml
from blocks.environment import Environment
from runbook.errors import OpsError
from tasks.failover.fencing import named_person

TOML = """
name = "{name}"
disposable = {disposable}
reports = "{directory}/reports"
{people}
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
"""
ALERTS = """
[alerts]
channels = ["file"]
file = "/nowhere"
path = [{ contacts = ["on-call"] }]
[alerts.contacts]
on-call = { role = "SRE", name = "山田 太郎" }
dba = { role = "DBA" }
"""
APPROVAL = """
[approval]
required = ["full-restore"]
[approval.approvers]
alice = { secret_env = "OPS_TOTP_ALICE" }
"""


def environment(directory: Path, people: str, *, disposable: bool = False, name: str = "blue") -> Environment:
    file = directory / f"{name}.toml"
    text = TOML.format(name=name, directory=directory, people=people, disposable=str(disposable).lower())
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPS_ENVIRONMENT", name)
        patch.setenv("OPS_ENVIRONMENT_FILE", str(file))
        patch.setenv("OPS_TOTP_ALICE", "JBSWY3DPEHPK3PXPJBSWY3DP")
        return toml.environment(name)


@pytest.mark.parametrize(
    "given",
    [
        "山田 太郎",
        "山田 太郎、iDRACで電源断",
        "山田 太郎: power off",
        "dba, power off",
        "DBA (iDRAC)",
        "Alice cut the VLAN",
    ],
)
def test_a_person_of_the_environment_attests(tmp_path: Path, given: str) -> None:
    assert named_person(f" {given} ", environment(tmp_path, ALERTS + APPROVAL)) == given


@pytest.mark.parametrize(
    "given", ["yes", "no", "n/a", "TODO", "Suzuki, power off", "山田", "dbadmin", "the drill", "on-call"]
)
def test_anything_else_is_refused_with_the_names(tmp_path: Path, given: str) -> None:
    with pytest.raises(OpsError) as refused:
        named_person(given, environment(tmp_path, ALERTS + APPROVAL))
    assert f"fenced_by “{given}” does not begin with the name of a person of blue" in str(refused.value)
    assert "(山田 太郎, dba, alice)" in str(refused.value)


def test_where_nobody_is_configured_it_says_where(tmp_path: Path) -> None:
    env = environment(tmp_path, "")
    assert named_person("  ", env) == "", "what is proven needs nobody"
    with pytest.raises(
        OpsError, match=r"blue has no people configured .*\[alerts.contacts\].*deployments.register blue"
    ):
        named_person("Yamada, power off", env)


def test_a_person_of_either_region_and_a_drill_of_disposable_ones(tmp_path: Path) -> None:
    region = environment(tmp_path, "", disposable=True, name="blue-dr")
    assert named_person("dba, power off", region, environment(tmp_path, ALERTS)) == "dba, power off"
    with pytest.raises(OpsError, match="does not begin"):
        named_person("the drill: all killed", region, environment(tmp_path, ALERTS))
    assert named_person("the drill: all killed", region, environment(tmp_path, "", disposable=True))
