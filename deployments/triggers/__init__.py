"""What Prefect does by itself: one module for each cause, each with `automations(client, environment)`."""
