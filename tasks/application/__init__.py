"""The application: its health, its files, its checkout, its start."""
