"""Appendix A of the manual: what is wrong, what says so, and which runbook is next."""
