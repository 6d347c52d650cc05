"""The demo base models that ship with Promptplex, and the recipes that make them."""
