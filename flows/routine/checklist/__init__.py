"""Guided checklists for work that only people can do (§7.1, §8.4)."""
