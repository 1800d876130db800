"""What a Redis holds: read from a scratch server, kept in the manifest, compared."""
