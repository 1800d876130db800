"""The format of WAL: names of segments, headers, pages."""
