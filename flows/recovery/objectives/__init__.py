"""Current recovery points against RPO and RTO, recovery options, and the recovery board (§8.1)."""
