"""An environment's TOML file: read, checked, its secrets resolved."""
