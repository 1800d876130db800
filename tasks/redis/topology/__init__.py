"""Replicas and Sentinels of a server: read them, detach them for a restore, attach them again."""
