"""Names of the data that ships with Solon: usable wherever a file is asked for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from solon.errors import InputError, nearest

SHIPPED = {
    "solon:red-team": "prompts/library/red_team_train.jsonl",
    "solon:red-team-heldout": "prompts/library/red_team_heldout.jsonl",
    "solon:helpful": "prompts/library/helpful_train.jsonl",
    "solon:helpful-heldout": "prompts/library/helpful_heldout.jsonl",
    "solon:judge-attacks": "prompts/library/judge_attacks.jsonl",
    "solon:demonstrations-harmless": "human/library/demonstrations_harmless.jsonl",
    "solon:demonstrations-helpful": "human/library/demonstrations_helpful.jsonl",
    "solon:revision-demonstrations": "human/library/revision_demonstrations.jsonl",
    "solon:comparisons-harmless": "human/library/comparisons_harmless.jsonl",
    "solon:comparisons-helpful": "human/library/comparisons_helpful.jsonl",
}


def shipped_path(name: str) -> Path:
    """The file behind a shipped name, or the path itself where it is no such name."""
    if not name.startswith("solon:"):
        return Path(name).expanduser()
    if name not in SHIPPED:
        raise InputError(f'"{name}": nothing of this name ships with Solon{nearest(name, list(SHIPPED))}')
    return Path(str(files("solon"))) / SHIPPED[name]
