"""WAL: its names, its way into the archive and back, whether it is whole, and what is in it."""
