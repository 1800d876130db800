"""Backups: found, published, encrypted, replicated, pruned."""
