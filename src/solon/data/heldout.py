"""Training and held-out data are split by prompt. Two prompts are copies where they have the same words."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence

from solon.errors import InputError
from solon.records import Chat, Comparison, Prompt, Source, fingerprint

# A shorter last turn ("yes, please") is the same in two conversations by chance. In a script without spaces between words,
# a run of ENOUGH_LETTERS letters counts as well.
ENOUGH_WORDS, ENOUGH_LETTERS = 4, 16


def normalised(text: str) -> str:
    """The words of a text, in one case and one Unicode form: the same for two copies of the text."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or "".join(plain.split())


def prompt_keys(chat: Chat) -> set[str]:
    """The keys of the prompt that ends this conversation: the whole conversation, and its last user turn."""
    messages = [(m.role, normalised(m.content)) for m in chat if m.role != "system"]
    if not messages:
        return set()
    last = messages[-1][1]
    whole = last if len(messages) == 1 else "\n".join(f"{role}: {text}" for role, text in messages)
    words = last.split()
    enough = len(words) >= ENOUGH_WORDS or max(map(len, words), default=0) >= ENOUGH_LETTERS
    return {whole, last} if enough else {whole}


def taught_keys(chat: Chat) -> set[str]:
    """The keys of every prompt inside a conversation: each user turn ends one."""
    return {key for end, m in enumerate(chat, start=1) if m.role == "user" for key in prompt_keys(chat[:end])}


def split_off(
    prompts: Sequence[Prompt], share: float, most: int | None, where: str, source: Source
) -> tuple[list[Prompt], list[Prompt]]:
    """(held out, training): a share of the different prompts, from the front of an order already drawn by the seed.

    share: 0..1, at least one prompt. most: at most this many prompts; None: no limit. Copies of a held-out prompt stay
    on the training side here; the caller takes them out with all other data that teach the prompt.
    """
    different: list[Prompt] = []
    seen: set[str] = set()
    for p in prompts:
        keys = prompt_keys(p.prompt)
        if not keys & seen:
            different.append(p)
        seen |= keys
    if len(different) < 2:
        raise InputError(
            f"{where} holds {len(different)} different prompt{'' if len(different) == 1 else 's'}, and a share of them "
            f"is to be held out; give more, or a file of others as prompts.heldout_{source}"
        )
    n = max(1, round(share * len(different)))
    out = different[: n if most is None else min(n, most)]
    ids = {id(p) for p in out}
    return out, [p for p in prompts if id(p) not in ids]


def split_comparisons(
    compared: Sequence[Comparison], n: int, key: str = "human.heldout_comparisons"
) -> tuple[list[Comparison], list[Comparison]]:
    """(held out, training): whole prompts are held out, in their order, until n comparisons are held out.

    key: the recipe's key, for the error. Raises InputError where no comparison would be left to learn from.
    """
    keys = [prompt_keys(c.prompt) for c in compared]
    rows: dict[str, list[int]] = {}  # the comparisons of each prompt key
    for i, keys_of_prompt in enumerate(keys):
        for prompt_key in keys_of_prompt:
            rows.setdefault(prompt_key, []).append(i)
    held: set[int] = set()
    for i in range(len(compared)):
        if len(held) >= n:
            break
        reached = [i]
        while reached:  # all comparisons that share a prompt with a held-out one
            row = reached.pop()
            if row not in held:
                held.add(row)
                reached += [j for prompt_key in keys[row] for j in rows.pop(prompt_key, ())]
    out, left = ([c for i, c in enumerate(compared) if (i in held) is side] for side in (True, False))
    if compared and not left:
        raise InputError(
            f"{key}: {n} of {len(compared)} comparisons, split by prompt; none would be left to learn from"
        )
    return out, left


def split_by_prompt(
    comparisons: Sequence[Comparison], share: float, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """(training, held out): about this share of the comparisons is held out; no prompt is on both sides."""
    by_prompt: dict[str, list[Comparison]] = {}
    for c in comparisons:
        by_prompt.setdefault(fingerprint("prompt", [m.model_dump() for m in c.prompt]), []).append(c)
    groups = [by_prompt[key] for key in sorted(by_prompt)]
    random.Random(seed).shuffle(groups)
    held_out: list[Comparison] = []
    while groups and len(held_out) < round(share * len(comparisons)):
        held_out += groups.pop()
    return [c for group in groups for c in group], held_out
