"""RPO and RTO now: recovery points, options, the recovery board (§8.1)."""
