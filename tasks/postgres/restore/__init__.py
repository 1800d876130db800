"""Restoring: a staged copy, the swap, and what was replaced."""
