"""The report of a finished run: every number with its interval and sample size, and the parts that were not measured."""
