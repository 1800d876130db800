"""DR drills (§8.4): the engine here, one module for each scenario in `scenarios/`.

To add a scenario:
- `scenarios/<name>.py`: a class of `scenario.Scenario` with the manual's texts and the steps. `database_failure` is the
  model. Every step gets a `scenario.Drill`. `lines.py` plans them; a scenario that does more adds lines to its own.
- its name in `drill.ScenarioName`, an instance in `drill.SCENARIOS`;
- its fault in `tasks/faults/`;
- a test that plays it, and a test whose negative control is accepted: that drill must be CRITICAL.
"""
