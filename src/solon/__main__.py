"""`python -m solon`, and what `accelerate launch -m solon` starts."""

from solon.cli import app

app()
