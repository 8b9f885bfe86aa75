"""Shared by the tests: the tiny random model, and a quiet machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for a tiny model a second thread costs more than it gives

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer model with random weights."""
    from solon.models.tiny import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def without_tree(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Call it with a model that is to go the padded way until the test ends."""
    from dataclasses import replace

    from solon.models.forward import base_of
    from solon.models.paths import paths_of

    def change(model: Any) -> None:
        base = base_of(model)
        plain = replace(paths_of(base), prefix_tree=False, llama_forward=False)
        monkeypatch.setitem(vars(base), "_solon_paths", (base.dtype, plain))

    return change


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Reference data of others, kept outside the project; absent on a user's machine."""
    path = Path(os.environ.get("SOLON_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set SOLON_REFERENCE_DATA")
    return path
