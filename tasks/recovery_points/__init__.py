"""Recovery points: the newest times to which a system could be restored now, by every means (§8.1)."""
