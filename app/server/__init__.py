"""The process of `promptplex serve`: uvicorn, its connections, signals, drain and supervision.

Nothing below knows uvicorn; under another ASGI host (`app.main.asgi_app`) this package isn't imported.
"""
