"""The scenarios of DR drills, one module each (§8.4)."""
