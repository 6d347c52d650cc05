"""Decode steps that a GPU is given by one call: recorded before the first request, over memory that stays."""
