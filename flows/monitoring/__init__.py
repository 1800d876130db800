"""付録B and 付録C: metrics, alerts, escalation."""
