"""The device's memory: what there is, what steps take of it, how much is for keys and values, and its end."""
