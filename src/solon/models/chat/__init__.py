"""A conversation as token ids."""
