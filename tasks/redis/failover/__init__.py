"""A data set's mastership handed over (§8.3): the servers, the pause, the promotion, the writes that count it."""
