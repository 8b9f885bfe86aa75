"""The reinforcement stage (RL-CAI, RLAIF): reward model on the labels, then PPO against it."""
