"""What uses Redis's memory (§2.1)."""
