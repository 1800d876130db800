"""Restores: a staged copy that is swapped, over the network, or key by key (§2.3)."""
