"""Backups of Redis: snapshots, AOFs, over the network, files without a manifest, and their proof (§2.3)."""
