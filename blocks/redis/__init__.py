"""Redis and Valkey servers: connections, and what their errors mean."""
