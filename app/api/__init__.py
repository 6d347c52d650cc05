"""The HTTP API: routes, schemas, errors, keys, middleware."""
