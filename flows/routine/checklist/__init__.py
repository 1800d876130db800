"""Guided checklists for what only a person can do (§7.1, §8.4)."""
