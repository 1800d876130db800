"""PostgreSQL: what a server and its databases are, dumps and their manifests, copies beside, the swap."""
