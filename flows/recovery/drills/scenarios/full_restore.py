"""Database, Redis and application files lost at once. Full restore from the backups (§8.2, as a drill)."""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from flows.recovery.drills import control, detection
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets
from flows.recovery.full_restore import full_restore
from flows.store import store_for
from runbook.kinds import Bound
from runbook.report import Report
from tasks.backups.catalogue import find_backup
from tasks.drill.sabotage import alter_row, copy_of, cut, flip
from tasks.faults.disposable import Fault
from tasks.faults.everything import lose_everything


class FullRestore(Scenario):
    """全データの喪失. It rehearses the restore from dumps: its negative control sabotages them."""

    name = "full_restore"
    title = "Loss of all data"
    situation = "Database, Redis and application files are lost at the same time"
    goal = "Full restore from backups (§8.2)"
    checks = "The RPO and RTO of §8.1 are met; every function works"
    backups = ("postgres", "redis", "files")
    sensors = ("application", "database")

    def targets(self, env: Environment) -> Targets:
        """The environment's RTO and RPO (§8.1)."""
        return Targets(env.rto_seconds, env.rpo_seconds)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return what deletes database, Redis and files."""
        return lose_everything.bind(env)

    def judge(self, report: Report, env: Environment) -> None:
        """The negative control sabotages copies of the newest dump."""
        where, backups = Path(env.backups.postgres), env.backups
        report.require(
            "steady state: store of the dumps",
            where.is_dir() and not backups.recipients,
            "run the drill where it is a directory and not encrypted: the negative control sabotages a copy",
            value=f"{where}{', encrypted' if backups.recipients else ''}",
        )

    def decide(self, drill: Drill) -> None:
        """The restore's plan."""
        plan = drill.run(full_restore, method="dump")
        drill.done["strategy"] = f"full-restore: {plan.facts.get('backup', '')}"
        name = str(plan.pins["backup"])
        drill.recovered_to = find_backup(store_for(drill.env, "postgres"), "postgres", name).manifest.taken

    def restore(self, drill: Drill) -> Report:
        """Run the restore."""
        done = drill.run(full_restore, method="dump", confirm=drill.env.name)
        facts = done.facts
        drill.done |= {
            "database": facts.get("backup", ""),
            "redis": facts.get("redis backup", ""),
            "files": facts.get("files backup", ""),
            "integrity": "content equal to the manifests" + detection.expectations_text(drill.env),
            "deployed": "with the files",
            "migrations": "the staged copy was migrated before the swap",
        }
        return done

    def verify(self, drill: Drill) -> None:
        """Every function works: the live data satisfies the expectations."""
        detection.require_expectations(drill)

    def control(self, drill: Drill) -> list[Refusal]:
        """Copies of the dump: cut, a byte changed, and a row changed with right checksums. The last one goes to the
        real restore: only the comparison of the staged copy can refuse it."""
        env, found = drill.env, list[Refusal]()
        backup = find_backup(store_for(env, "postgres"), "postgres", "latest", env.name)
        for number, spoil in enumerate((cut, flip), 1):
            derived, copy = _with_copy(drill, backup.name, number)
            if number == 1:
                control.require_accepted(derived, full_restore, method="dump")
            found.append(control.try_sabotaged(derived, full_restore, spoil(copy), method="dump"))
        derived, copy = _with_copy(drill, backup.name, 3)
        sabotage = alter_row(env.postgres, copy, env.application.writes.steps[0].column)
        drill.note(sabotaged=str(copy))
        found.append(
            control.try_sabotaged(
                derived, full_restore, sabotage, method="dump", stop_services="at_swap", confirm=env.name
            )
        )
        if not found[-1].refused:  # it is live now
            self.heal(drill)
        return found

    def heal(self, drill: Drill) -> None:
        """Restore everything from the good backups, unless the system is healthy."""
        env = drill.env
        env.forget_roles()
        sensors = detection.quick(env)
        if "sabotaged" in drill.half_done.notes or sensors["application"] or sensors["database"]:
            drill.run(full_restore, method="dump", confirm=env.name)


def _with_copy(drill: Drill, name: str, number: int) -> tuple[Environment, Path]:
    """The same system with a store that contains a copy of one dump only; and that copy."""
    env, scratch = drill.env, drill.directory / f"control-{number}"
    copy = copy_of(Path(env.backups.postgres) / name, scratch / "postgresql" / name)
    backups = env.backups.model_copy(update={"postgres": str(scratch / "postgresql")})
    return env.derived({"backups": backups}, reports=scratch / "reports"), copy
