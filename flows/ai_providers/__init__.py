"""§5 of the manual: AI providers."""
