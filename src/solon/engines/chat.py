"""The names that scripts outside Solon import; the functions themselves are in `solon.models.chat`."""

from solon.models.chat.encode import chat_ids as chat_ids
from solon.models.chat.encode import text_ids as text_ids
