"""Statistics, and measures of texts and of probabilities."""
