"""Make real faults for drills: in a disposable environment only, and only where a plan has them."""
