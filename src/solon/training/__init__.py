"""What every training shares: one optimisation loop, finite weights, TRL's trainers, and writing the trained model."""
