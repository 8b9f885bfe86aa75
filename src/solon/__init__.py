"""Solon: Constitutional AI and RLAIF, end to end.

A constitution and prompts go in; a model that follows the constitution, the reward model, the datasets and the evidence
come out. `docs/architecture.md` describes the packages.
"""

__version__ = "0.1.0"
