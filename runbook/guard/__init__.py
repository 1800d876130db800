"""What a run needs before it changes anything: the lock, a confirmed plan, a permit, a second person."""
