"""The name that scripts outside Solon import; the model itself is in `solon.models.tiny`."""

from solon.models.tiny import make_tiny_model as make_tiny_model
