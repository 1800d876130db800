"""Backups of Redis (§2.3): snapshots, AOFs, over the network; files of others; and their proof."""
