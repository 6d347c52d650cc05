"""Promptplex: one frozen language model, thousands of tasks, each a small trained prompt."""

__version__ = "0.1.0"
