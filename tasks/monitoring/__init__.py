"""What a monitoring remembers: who is over a limit and since when, what was measured, what was told."""
