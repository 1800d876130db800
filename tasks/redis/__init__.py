"""A Redis or Valkey server: its snapshots, their content, and their way back."""
