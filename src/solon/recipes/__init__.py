"""Recipes: the schema that the stages make, the recipes that ship, and the run of a recipe from its first stage to its last."""
