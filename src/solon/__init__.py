"""Solon: Constitutional AI and RLAIF, end to end.

A constitution and prompts go in; a model trained to follow it, the reward model, the datasets and the
evidence come out. `docs/architecture.md` shows the rooms; each package below is one part of the method.
"""

__version__ = "0.1.0"
