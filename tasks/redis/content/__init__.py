"""The content of a Redis server: read, stored in the manifest, compared."""
