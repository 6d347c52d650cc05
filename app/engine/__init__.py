"""Continuous batching of mixed tasks. Token ids in, token ids out: no text, HTTP or Redis here."""
