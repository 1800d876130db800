"""PostgreSQL's primary replaced by its standby (§8.3): who is fenced, who is fit, the promotion, the way back."""
