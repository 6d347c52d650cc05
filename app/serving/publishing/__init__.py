"""From an upload to a released version."""
