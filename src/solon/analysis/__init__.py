"""What a training did: models side by side, how far a policy moved, judges on test suites."""
