"""An incident under investigation: contained, the transaction found, lost writes salvaged (§8.4)."""
