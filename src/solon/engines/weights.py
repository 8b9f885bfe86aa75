"""The name that scripts outside Solon import; the function itself is in `solon.models.weights`."""

from solon.models.weights import load_tokenizer as load_tokenizer
