"""PostgreSQL servers: connections, roles of the nodes, refused log-ins, WAL."""
