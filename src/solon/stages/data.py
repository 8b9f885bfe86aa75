"""The data files of a recipe: read, split by prompt, cut to size. No held-out prompt is in any training data.

Two things are held out: prompts, which every model answers at the end, and human comparisons, which measure the judge
and the reward model. Where the training prompts come from a user's file and no held-out file is named, a share of the
user's prompts is held out. A text that is on both sides is taken out of training and counted.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
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
    """The data that a recipe trains on, and the data that it measures on.

    rl_prompts: of the reinforcement stage, the prompts of the supervised stage among them.
    heldout_from: by kind of prompt, the source of the held-out prompts in words. removed: by kind of training data, the number of
    items that were taken out because their prompt is held out. names: the files that were read.
    """

    def inputs(self) -> dict[str, str]:
        """SHA-256 of each file that was read. A resumed run must read the same files, or held-out pairs could move."""
        return {name: hashlib.sha256(shipped_path(name).read_bytes()).hexdigest() for name in self.names}

    def __init__(self, recipe: Common) -> None:
        p, h = recipe.prompts, recipe.human
        rng = random.Random(recipe.seed)
        self.names: list[str] = []
        self.heldout_from: dict[str, str] = {}
        self.removed: dict[str, int] = {}

        def shuffled(rows: list[R]) -> list[R]:
            rng.shuffle(rows)  # files are often sorted by kind, and the first n items should be of every kind
            return rows

        def prompts(name: str, source: Source) -> list[Prompt]:
            rows = self._read(name, read_prompts)
            return shuffled([x if x.source else x.model_copy(update={"source": source}) for x in rows])

        kinds: list[tuple[Source, str, list[Prompt], str | None, int | None, int]] = [
            ("red_team", p.red_team, prompts(p.red_team, "red_team"), p.heldout_red_team, p.n_red_team, p.rl_red_team),
            ("helpful", p.helpful, prompts(p.helpful, "helpful"), p.heldout_helpful, p.n_helpful, p.rl_helpful),
        ]
        heldout: list[Prompt] = []
        training: list[list[Prompt]] = []
        for source, name, rows, heldout_file, n, more in kinds:
            unused = n == 0 and not more
            if named := heldout_file or (None if unused else HELDOUT_OF.get(name)):
                out = prompts(named, source)[: p.n_heldout]
                self.heldout_from[source] = f"{len(out)} of {named}"
            elif unused:
                out = []
            else:
                out, rows = split_off(rows, p.heldout_share, p.n_heldout, f"prompts.{source}: {name}", source)
                self.heldout_from[source] = f"{len(out)} of {len(out) + len(rows)} in {name}, kept out of training"
            heldout += out
            training.append([] if unused else rows)
        self.heldout = _unique(heldout)
        kept_out = {key for x in self.heldout for key in prompt_keys(x.prompt)}

        demonstrations = shuffled([d for name in h.demonstrations for d in self._read(name, read_demonstrations)])
        chains = h.revision_demonstrations
        revised = shuffled(self._read(chains, read_revision_chains) if chains else [])
        compared = shuffled([c for name in h.comparisons for c in self._read(name, read_comparisons)])
        compared = self._without(kept_out, "human comparisons", compared, lambda c: c.prompt)
        self.comparisons_from = (
            h.heldout_from
        )  # the file of the held-out comparisons; None: a part of the recipe's comparisons
        if h.heldout_from is None:
            self.heldout_comparisons, self.comparisons = split_comparisons(
                compared[: h.n_comparisons], h.heldout_comparisons
            )
        else:
            self.heldout_comparisons = shuffled(self._read(h.heldout_from, read_comparisons))[: h.heldout_comparisons]
        kept_out |= {key for c in self.heldout_comparisons for key in prompt_keys(c.prompt)}
        if h.heldout_from is not None:
            compared = self._without(kept_out, "human comparisons", compared, lambda c: c.prompt)
            self.comparisons = compared[: h.n_comparisons]

        by_kind = [self._without(kept_out, "training prompts", rows, lambda x: x.prompt) for rows in training]
        drawn = [rows[:n] for rows, (*_, n, _) in zip(by_kind, kinds, strict=True)]
        further = [rows[len(own) :][:more] for own, rows, (*_, more) in zip(drawn, by_kind, kinds, strict=True)]
        self.prompts = _unique(_interleave(*drawn))
        self.asked_further = p.rl_red_team + p.rl_helpful
        self.rl_prompts = _unique([*self.prompts, *_interleave(*further)])
        demonstrations = self._without(kept_out, "demonstrations", demonstrations, lambda d: d.messages)
        self.demonstrations: list[SFTExample] = demonstrations[: h.n_demonstrations]
        revised = self._without(kept_out, "revision demonstrations", revised, lambda c: c.prompt)
        self.revision_demonstrations: list[RevisionChain] = revised[: h.n_revision_demonstrations or h.n_demonstrations]
        self._check_not_empty(recipe)

    def _read(self, name: str, read: Callable[[str], list[R]]) -> list[R]:
        self.names.append(name)
        return list(read(name))

    def _without(self, kept_out: set[str], kind: str, rows: Sequence[R], chat: Callable[[R], Chat]) -> list[R]:
        """The rows that teach no held-out prompt. The number of the other rows is counted in `removed` under their kind."""
        remaining = [row for row in rows if not taught_keys(chat(row)) & kept_out]
        if len(remaining) < len(rows):
            self.removed[kind] = self.removed.get(kind, 0) + len(rows) - len(remaining)
        return remaining

    def _check_not_empty(self, recipe: Common) -> None:
        """Raises InputError where nothing is left to train on."""
        h = recipe.human
        data = (
            ("training prompts", "prompts", True, self.prompts),
            ("demonstrations", "human.demonstrations", bool(h.demonstrations), self.demonstrations),
            ("human comparisons", "human.comparisons", bool(h.comparisons), self.comparisons),
        )
        for kind, key, wanted, rows in data:
            if wanted and not rows and self.removed.get(kind):
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
            "rl_prompts": len(self.rl_prompts),
            "heldout": len(self.heldout),
            "heldout_from": self.heldout_from,
            "comparisons": len(self.comparisons),
            "heldout_comparisons": len(self.heldout_comparisons),
            "removed": self.removed,
        }

    def describe(self) -> Iterator[str]:
        """The split, in lines for the user."""
        kinds = {"red_team": "red-team", "helpful": "helpful"}
        parts = [f"{kinds[source]} {words}" for source, words in self.heldout_from.items()]
        yield f"held-out prompts: {'; '.join(parts) if parts else 'none'}"
        if more := len(self.rl_prompts) - len(self.prompts):
            yield f"further prompts, for a reinforcement stage that samples: {more}"
        if more < self.asked_further:
            yield f"prompts.rl_red_team and prompts.rl_helpful ask for {self.asked_further}, and the sets hold no more"
        if self.heldout_comparisons:
            where = f"of {self.comparisons_from}" if self.comparisons_from else "split by prompt"
            yield f"held-out human comparisons: {len(self.heldout_comparisons)}, {where}"
        if self.removed:
            counts = ", ".join(f"{n} {kind}" for kind, n in self.removed.items())
            yield f"taken out of training, because the prompt is held out: {counts}"


def _interleave(first: list[R], second: list[R]) -> list[R]:
    """The items of both lists in turn, then the rest of the longer list, so that each batch has both kinds."""
    both = [item for pair in zip(first, second, strict=False) for item in pair]
    return both + first[len(second) :] + second[len(first) :]


def _unique(prompts: list[Prompt]) -> list[Prompt]:
    repeated = [name for name, n in Counter(p.id for p in prompts).items() if n > 1]
    if repeated:
        raise InputError(f'the prompt id "{repeated[0]}" stands in two prompt files; make ids unique')
    return prompts
