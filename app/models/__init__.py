"""Base models: transformers models behind the Backbone protocol, probed before they serve."""
