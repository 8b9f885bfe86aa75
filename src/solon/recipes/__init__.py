"""Recipes: the schema that the stages make, the recipes that ship, and a run of one from its first stage to its last."""
