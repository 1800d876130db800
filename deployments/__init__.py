"""Where and when flows run: environments, blocks, limits, automations."""
