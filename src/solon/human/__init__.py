"""People in the loop: a sample of the AI's comparisons for people to check (the hybrid recipe's last step)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from solon.publishing import write_whole
from solon.records import Comparison, text_of


def draw_validation_sample(folder: Path, comparisons: Sequence[Comparison], n: int, seed: int) -> list[Comparison]:
    """Draw n labelled comparisons by the seed and write them to folder/sample.jsonl, blind.

    The two responses are in random order, and the AI's label is left out so that it cannot sway the person. The `id`
    leads back to the label. The person writes `choice`: "a", "b" or "tie". An existing file is kept.
    """
    labelled = [c for c in comparisons if c.label is not None]
    rng = random.Random(seed)
    drawn = rng.sample(labelled, min(n, len(labelled)))
    rows = []
    for c in drawn:
        a, b = rng.sample([text_of(c.chosen), text_of(c.rejected)], 2)
        prompt = [m.model_dump() for m in c.prompt]
        rows.append({"id": c.id, "prompt": prompt, "a": a, "b": b, "principle": c.principle, "choice": None})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sample.jsonl"
    if not path.exists():  # a person may have begun to fill it in
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return drawn
