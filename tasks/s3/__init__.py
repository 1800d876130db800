"""Backups in S3: objects with their SHA-256, uploads and downloads that go on after a cut connection."""
