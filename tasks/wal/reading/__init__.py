"""WAL read for what it contains: commits, transactions, changed rows."""
