"""Telling people: incidents that outlive every process, messages, and the channels that carry them."""
