"""RDB and AOF of a running server (§2.3): what it says of them, its files, and saves to their proven end."""
