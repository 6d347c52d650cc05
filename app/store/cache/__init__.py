"""Prompts in host memory, in Redis, and the tiers between them and the store."""
