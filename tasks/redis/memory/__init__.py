"""What fills a server's memory (§2.1): a sweep over all keys, page by page, summed by prefix."""
