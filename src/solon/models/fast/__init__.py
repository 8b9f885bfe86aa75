"""The same numbers in fewer passes, taken where a model has proved it."""
