"""What an auditor asks for, in one archive (§7.1)."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.routine.evidence import Evidence
from flows.routine.evidence_parts import collect
from runbook.render import key, size
from runbook.report import Report
from runbook.run import runbook
from tasks.evidence import holding, seal, secrets_of, verify_sealed


@flow(name="collect-audit-evidence", flow_run_name="collect-audit-evidence {environment}")
def collect_audit_evidence(environment: str, days: Annotated[int, Field(ge=1, le=3660)] = 365) -> Report:
    """セキュリティ監査: 証跡の収集 (§7.1)

    監査人に渡す証跡を1つのアーカイブ (tar.gz) にまとめる。マニフェストに各ファイルの SHA-256 がある。

    Verifies the chain of reports (an edited or removed one is critical), and collects of the last `days`: the index of
    all reports; those of drills, of verified backups and of answered checklists, whole; who has access (roles of the
    database with their rights and pg_hba.conf, ACL users of Redis, the users that services run as, the application's
    users by its audit log); versions; settings. Run it yearly, before the checklist security_audit.

    It changes nothing but that it writes the archive, which its owner's group may read, below evidence/ in the reports.
    No password is in it, nor a hash of one; what would hold a secret of this environment is left out, and is critical.
    What could not be asked is told as not measured. Evidence: the archive, and its own SHA-256 in the report.

    Args:
        environment: 対象の環境
        days: さかのぼる日数
    """
    env = Environment.find(environment)
    with runbook("Collect audit evidence", env) as report:
        evidence = Evidence(report, secrets_of(env.whole().values()))
        collect(report, env, evidence, report.started - timedelta(days=days))
        leaking = holding(evidence.files, evidence.secrets)
        for name in leaking:
            del evidence.files[name]
        told = f"left out: {', '.join(leaking)}" if leaking else f"{len(evidence.secrets)} looked for"
        report.expect("no secret is in the archive", not leaking, "change that secret: it stands where it must not",
                      value=told)  # fmt: skip
        path = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}-{key(report)}-{env.name}.tar.gz"
        about = {"environment": env.name, "collected": report.started_at, "days": days, "missing": evidence.missing}
        sealed = seal(path, evidence.files, about, report.started)
        wrong = verify_sealed.after(sealed)(path)
        report.expect("the archive is as its manifest says", not wrong, "collect it again", value="; ".join(wrong[:5]))
        report.fact("archive", f"{path}, {size(sealed.bytes)}, {sealed.files} files")
        report.fact("SHA-256 of the archive", sealed.sha256)
        evidence.tell_missing()
        report.outcome = f"{sealed.files} files of evidence, {len(evidence.missing)} things not measured"
    return report
