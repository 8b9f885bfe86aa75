"""AI feedback: a judge compares two responses under the constitution's principles."""
