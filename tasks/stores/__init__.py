"""Where backups are kept: a directory of this host, or a bucket of an S3 service."""
