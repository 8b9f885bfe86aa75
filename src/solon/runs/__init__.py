"""Recipes, stages, the run directory: resume, provenance and the ledger, the same way for every stage."""
