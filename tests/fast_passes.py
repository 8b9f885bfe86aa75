"""Tests of the fast ways through a model, which are skipped where the folder models/fast is not there."""

from __future__ import annotations

import pytest

from solon.models.passes import fast

needs_fast = pytest.mark.skipif(fast() is None, reason="models/fast is not there")
