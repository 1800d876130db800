"""The way back (§2.3): beside and swapped, over the network, or key by key; and who stands around meanwhile."""
