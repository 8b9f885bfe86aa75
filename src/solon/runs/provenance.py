"""What made a record."""

from __future__ import annotations

from typing import Any

from solon import __version__
from solon.constitution import Constitution
from solon.engines import Engine


def provenance(constitution: Constitution, engine: Engine, seed: int, **more: Any) -> dict[str, Any]:
    """What made a record: constitution, model, seed and version."""
    return {
        "constitution": constitution.fingerprint,
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "seed": seed,
        "solon": __version__,
        **more,
    }
