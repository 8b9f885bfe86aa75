"""Shared by the tests: the tiny random model, and a quiet machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for a tiny model a second thread costs more than it gives


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer model with random weights."""
    from solon.engines.tiny import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Reference data of others, kept outside the project; absent on a user's machine."""
    path = Path(os.environ.get("SOLON_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set SOLON_REFERENCE_DATA")
    return path
