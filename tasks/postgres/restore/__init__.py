"""Restores: a staged copy, the swap, and the replaced databases."""
