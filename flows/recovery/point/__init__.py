"""Recovery of the cluster, or of tables, to a point in time (§8.2)."""
