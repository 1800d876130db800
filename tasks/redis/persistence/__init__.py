"""Persistence of a running server: its state, its files, and saves (§2.3)."""
