"""The HTTP edge: routes, schemas, errors. Pydantic lives here and in `app/settings.py` only."""
