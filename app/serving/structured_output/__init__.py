"""Answers held to a grammar: JSON schemas, regular expressions, choices."""
