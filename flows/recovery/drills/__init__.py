"""The scenarios of DR drills (§8.4), one module each.

To add one: a class of `scenario.Scenario` in `drills/<scenario>.py`, with what the manual says of it (title, situation,
goal, checks) and its steps; its name in `flows.recovery.drills.drill.ScenarioName`, an instance in
`flows.recovery.drills.drill.SCENARIOS`; a fault in `tasks/faults/`; a test that plays it, and one in which its negative
control is accepted (the drill must be CRITICAL then). `database_failure` is the model. What its steps get is a
`scenario.Drill`.
"""
