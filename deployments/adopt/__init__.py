"""Describe a running system as an environment: found on this host, asked, or given as flags. Changes nothing there."""
