"""The web console: static pages that talk to the server's own HTTP API, and the routes that serve them."""
