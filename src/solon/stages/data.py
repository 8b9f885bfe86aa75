"""The files a recipe names: read, split by prompt, cut to size. What is held out is in nothing that is trained on.

Two things are held out: prompts, which every model answers at the end, and human comparisons, which measure the judge
and the reward model. Where the training prompts are the user's own and no held-out file is named, a share of the
user's prompts is held out. A text that stands on both sides is taken out of training, and counted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from solon.data import read_comparisons, read_demonstrations, read_prompts, read_revision_chains, shipped_path
from solon.data.heldout import prompt_keys, split_comparisons, split_off, taught_keys
from solon.errors import InputError
from solon.records import Chat, Prompt, RevisionChain, SFTExample, Source
from solon.runs.common import Common

R = TypeVar("R")
HELDOUT_OF = {"solon:red-team": "solon:red-team-heldout", "solon:helpful": "solon:helpful-heldout"}


class Data:
    """What a recipe trains on and what it measures on.

    heldout_from: by kind of prompt, in words, where the held-out prompts come from. removed: by kind of training data,
    how many items were taken out because their prompt is held out.
    """

    def inputs(self) -> dict[str, str]:
        """SHA-256 of each file that was read: a resumed run must see the same, or held-out pairs could move."""
        return {name: hashlib.sha256(shipped_path(name).read_bytes()).hexdigest() for name in self.names}

    def __init__(self, recipe: Common) -> None:
        p, h = recipe.prompts, recipe.human
        rng = random.Random(recipe.seed)
        self.names: list[str] = []
        self.heldout_from: dict[str, str] = {}
        self.removed: dict[str, int] = {}

        def shuffled(rows: list[R]) -> list[R]:
            rng.shuffle(rows)  # files are often sorted by kind; the first n should be of every kind
            return rows

        def prompts(name: str, source: Source) -> list[Prompt]:
            found = self._read(name, read_prompts)
            return shuffled([x if x.source else x.model_copy(update={"source": source}) for x in found])

        red_team, helpful = prompts(p.red_team, "red_team"), prompts(p.helpful, "helpful")
        heldout: list[Prompt] = []
        training: list[list[Prompt]] = []
        kinds: list[tuple[Source, str, list[Prompt], str | None, int | None]] = [
            ("red_team", p.red_team, red_team, p.heldout_red_team, p.n_red_team),
            ("helpful", p.helpful, helpful, p.heldout_helpful, p.n_helpful),
        ]
        for source, name, own, given, n in kinds:
            if named := given or (HELDOUT_OF.get(name) if n != 0 else None):
                out = prompts(named, source)[: p.n_heldout]
                self.heldout_from[source] = f"{len(out)} of {named}"
            elif n == 0:
                out = []
            else:
                out, own = split_off(own, p.heldout_share, p.n_heldout, f"prompts.{source}: {name}", source)
                self.heldout_from[source] = f"{len(out)} of {len(out) + len(own)} in {name}, kept out of training"
            heldout += out
            training.append(own if n != 0 else [])
        self.heldout = _unique(heldout)
        kept_out = {key for x in self.heldout for key in prompt_keys(x.prompt)}

        demonstrations = shuffled([d for name in h.demonstrations for d in self._read(name, read_demonstrations)])
        chains = h.revision_demonstrations
        revised = shuffled(self._read(chains, read_revision_chains) if chains else [])
        compared = shuffled([c for name in h.comparisons for c in self._read(name, read_comparisons)])
        compared = self._without(kept_out, "human comparisons", compared, lambda c: c.prompt)
        compared = _first(compared, h.n_comparisons)
        self.heldout_comparisons, self.comparisons = split_comparisons(compared, h.heldout_comparisons)
        kept_out |= {key for c in self.heldout_comparisons for key in prompt_keys(c.prompt)}

        of_kind = [self._without(kept_out, "training prompts", rows, lambda x: x.prompt) for rows in training]
        self.prompts = _unique(_interleave(*(_first(r, n) for r, (*_, n) in zip(of_kind, kinds, strict=True))))
        demonstrations = self._without(kept_out, "demonstrations", demonstrations, lambda d: d.messages)
        self.demonstrations: list[SFTExample] = _first(demonstrations, h.n_demonstrations)
        revised = self._without(kept_out, "revision demonstrations", revised, lambda c: c.prompt)
        self.revision_demonstrations: list[RevisionChain] = _first(revised, h.n_demonstrations)
        self._enough(recipe)

    def _read(self, name: str, read: Callable[[str], list[R]]) -> list[R]:
        self.names.append(name)
        return list(read(name))

    def _without(self, kept_out: set[str], kind: str, rows: Sequence[R], chat: Callable[[R], Chat]) -> list[R]:
        """The rows that teach no held-out prompt; how many there were that do is counted under their kind."""
        left = [row for row in rows if not taught_keys(chat(row)) & kept_out]
        if len(left) < len(rows):
            self.removed[kind] = self.removed.get(kind, 0) + len(rows) - len(left)
        return left

    def _enough(self, recipe: Common) -> None:
        """Raises InputError where nothing is left to train on."""
        h = recipe.human
        told = {
            "training prompts": (not self.prompts, "prompts"),
            "demonstrations": (bool(h.demonstrations) and not self.demonstrations, "human.demonstrations"),
            "human comparisons": (bool(h.comparisons) and not self.comparisons, "human.comparisons"),
        }
        for kind, (empty, key) in told.items():
            if empty and self.removed.get(kind):
                raise InputError(
                    f"{key}: every one is among the held-out prompts or comparisons, so none is left to train on; "
                    "hold out other prompts"
                )
        if not self.prompts:
            raise InputError("prompts: none is left to train on; raise prompts.n_red_team or prompts.n_helpful")

    def split(self) -> dict[str, Any]:
        """The split, for the report."""
        return {
            "prompts": len(self.prompts),
            "heldout": len(self.heldout),
            "heldout_from": self.heldout_from,
            "comparisons": len(self.comparisons),
            "heldout_comparisons": len(self.heldout_comparisons),
            "removed": self.removed,
        }

    def told(self) -> Iterator[str]:
        """The split, in lines for a person."""
        kinds = {"red_team": "red-team", "helpful": "helpful"}
        parts = [f"{kinds[source]} {words}" for source, words in self.heldout_from.items()]
        yield f"held-out prompts: {'; '.join(parts) if parts else 'none'}"
        if self.heldout_comparisons:
            yield f"held-out human comparisons: {len(self.heldout_comparisons)}, split by prompt"
        if self.removed:
            counts = ", ".join(f"{n} {kind}" for kind, n in self.removed.items())
            yield f"taken out of training, because the prompt is held out: {counts}"


def _first(rows: list[R], n: int | None) -> list[R]:
    return rows if n is None else rows[:n]


def _interleave(a: list[R], b: list[R]) -> list[R]:
    """One of each in turn, then what is left of the longer: each batch sees both kinds."""
    both = [x for pair in zip(a, b, strict=False) for x in pair]
    return both + a[len(b) :] + b[len(a) :]


def _unique(prompts: list[Prompt]) -> list[Prompt]:
    seen: set[str] = set()
    for p in prompts:
        if p.id in seen:
            raise InputError(f'the prompt id "{p.id}" stands in two prompt files; make ids unique')
        seen.add(p.id)
    return prompts
