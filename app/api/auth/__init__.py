"""Keys: which request may reach which route and task."""
