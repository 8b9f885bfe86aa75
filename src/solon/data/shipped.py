"""Names of the data that ships with Solon: usable wherever a file is asked for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from solon.errors import InputError, nearest

SHIPPED = {
    "solon:red-team": "data/library/red_team_train.jsonl",
    "solon:red-team-heldout": "data/library/red_team_heldout.jsonl",
    "solon:helpful": "data/library/helpful_train.jsonl",
    "solon:helpful-heldout": "data/library/helpful_heldout.jsonl",
    "solon:judge-attacks": "data/library/judge_attacks.jsonl",
    "solon:demonstrations-harmless": "data/library/demonstrations_harmless.jsonl",
    "solon:demonstrations-helpful": "data/library/demonstrations_helpful.jsonl",
    "solon:revision-demonstrations": "data/library/revision_demonstrations.jsonl",
    "solon:comparisons-harmless": "data/library/comparisons_harmless.jsonl",
    "solon:comparisons-helpful": "data/library/comparisons_helpful.jsonl",
}


def shipped_path(name: str) -> Path:
    """The file behind a shipped name, or the path itself where it is no such name."""
    if not name.startswith("solon:"):
        return Path(name).expanduser()
    if name not in SHIPPED:
        raise InputError(f'"{name}": nothing of this name ships with Solon{nearest(name, list(SHIPPED))}')
    return Path(str(files("solon"))) / SHIPPED[name]
