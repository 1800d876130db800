"""AI providers, each by its own API: what they answer, how it looks, and how long their models and versions live."""
