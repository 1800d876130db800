"""WAL on its way to standbys, synchronous commits, transaction ids."""
