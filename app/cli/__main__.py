"""`python -m app.cli`: the same as `promptplex`, where the package isn't installed."""

from app.cli import main

main()
