"""Redis's settings (§2.3, §2.4)."""
