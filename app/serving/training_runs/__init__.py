"""Training runs that clients start: each is `promptplex train` in a process of its own, beside serving."""
