"""The effects of a training: models side by side, the KL of the policy; and judges on test suites."""
