"""What every training shares: one optimisation loop, finite numbers, saving and publishing."""
