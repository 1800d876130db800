"""Recovery: restores, failovers and drills against the commands that they replace."""
