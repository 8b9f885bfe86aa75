"""`python -m solon`, and `accelerate launch -m solon`."""

from solon.cli import app

app()
