"""Attention over packed tokens and resident keys and values, as a transformers attention function."""
