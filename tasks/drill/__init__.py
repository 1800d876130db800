"""A client of drills that writes all the time, its ledger, and the account of what a system has lost of it."""
