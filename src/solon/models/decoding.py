"""Decoding for a causal LM in this process: left padding, a preallocated cache, a batch that shrinks.

Written for CPUs as much as for GPUs. What it does that `model.generate` does not: attention on grouped keys
without copying them per head, sampling by one cumulative sum instead of `multinomial` (75 ms a step against
2.6 ms at a vocabulary of 49k and a batch of 64, on two cores), and rows that leave the batch when they end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from solon import distributed
from solon.models.fast import prefix_tree as tree
from solon.models.fast.llama_forward import Lean, lean
from solon.models.forward import forward
from solon.models.paths import GROUPED, paths_of
from solon.models.sharding import is_shared

# What an attention layer may hand over beside queries, keys, values and mask, and what makes leaving it aside right.
UNDERSTOOD = {
    "scaling",  # used
    "dropout",  # must be 0
    "is_causal",  # must not be False
    "sliding_window",  # is in the mask; a tree's rows are not longer
    "position_ids",  # of use to flash attention alone
    "use_cache",
    "output_attentions",  # must not be True
    "output_router_logits",
    "output_hidden_states",
}


class NotUnderstood(TypeError):
    """An attention layer asks for something that Solon's attention does not compute."""


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that never copies keys and values per query head.

    query: (batch, heads, q, d); key, value: (batch, kv_heads, k, d); attention_mask: (batch, 1, q, k) or None.
    Returns (batch, q, heads, d), None.
    """
    _check_understood(kwargs)
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else float(kwargs["scaling"])
    if tree.active():
        return tree.tree_attention(query, key, value, scaling), None
    batch, heads, q_len, _ = query.shape
    kv_heads = key.shape[1]
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask >= 0  # additive masks hold 0 and the smallest number
    if q_len == 1 and not query.requires_grad:
        return _last_token(query, key, value, None if attention_mask is None else ~attention_mask, scaling), None
    if query.device.type == "cpu" and q_len == key.shape[2] and batch * q_len <= PLAIN_TOKENS and q_len <= PLAIN_LENGTH:
        return _plain_attention(query, key, value, attention_mask, scaling), None
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and q_len > 1,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2).contiguous(), None


def _check_understood(given: dict[str, Any]) -> None:
    """Raises NotUnderstood where leaving an argument aside would change the numbers."""
    strange = [name for name, value in given.items() if name not in UNDERSTOOD and value is not None]
    if given.get("dropout"):
        strange.append("dropout")
    if given.get("is_causal") is False:
        strange.append("is_causal=False")
    if given.get("output_attentions"):
        strange.append("output_attentions")
    if strange:
        raise NotUnderstood(f"its attention uses {', '.join(sorted(strange))}")


def _last_token(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float) -> Tensor:
    """query: (batch, heads, 1, d); hidden: what it must not see, (batch, 1, 1, k). Returns (batch, 1, heads, d)."""
    batch, heads, _, d = query.shape
    weights = torch.matmul(query.reshape(batch, key.shape[1], -1, d), key.transpose(2, 3)).float().mul_(scaling)
    if hidden is not None:
        weights.masked_fill_(hidden, float("-inf"))
    return torch.matmul(weights.softmax(-1).to(value.dtype), value).view(batch, 1, heads, d)


PLAIN_TOKENS, PLAIN_LENGTH = 4096, 512  # a training batch: above them the (length x length) weights cost memory


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """The textbook's three steps. Forward and backward of 16 x 130 tokens took 12 ms on two cores, torch's fused one 38.

    The choice between the two must not depend on gradients: PPO's first ratio is 1 because both passes are the same.
    """
    batch, heads, length, d = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, d)
    scores = (torch.matmul(grouped, key.transpose(2, 3)) * scaling).view(batch, heads, length, length)
    if attention_mask is None:
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)  # finite: a row of padding sees nothing
    weights = scores.softmax(-1).view(batch, kv_heads, -1, length)
    return torch.matmul(weights, value).view(batch, heads, length, d).transpose(1, 2).contiguous()


def grouped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask. A tree of rows knows its own, which is plain causal: any other mask is refused."""
    if not tree.active():
        return sdpa_mask(*args, **kwargs)
    window = kwargs.get("local_size")
    if kwargs.get("use_vmap") or (window is not None and tree.longest() > window):
        raise NotUnderstood("its mask is not plain causal")
    return None


AttentionInterface.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, grouped_mask)


class _Layer(DynamicLayer):
    """A cache layer that writes into room reserved beforehand instead of concatenating at each step."""

    capacity: int = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[3])
            self.room = (
                key_states.new_zeros(shape),
                value_states.new_zeros((*shape[:3], value_states.shape[3])),
            )
            self.used = 0
        end = self.used + key_states.shape[2]
        self.room[0][:, :, self.used : end] = key_states
        self.room[1][:, :, self.used : end] = value_states
        self.used = end
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def take(self, rows: Tensor, of: int, length: int, keys: Tensor, values: Tensor) -> None:
        """Hold these keys and values, (rows, kv_heads, length, d), as those of some of `of` rows."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            shape = (of, keys.shape[1], self.capacity)
            self.room = keys.new_zeros((*shape, keys.shape[3])), values.new_zeros((*shape, values.shape[3]))
        for room, given in zip(self.room, (keys, values), strict=True):
            room[rows, :, :length] = given
        self.used = length
        self.keys, self.values = self.room[0][:, :, :length], self.room[1][:, :, :length]

    def keep(self, rows: Tensor) -> None:
        self.room = self.room[0][rows], self.room[1][rows]
        self.keys, self.values = self.room[0][:, :, : self.used], self.room[1][:, :, : self.used]


ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # whose cache holds keys and values


def reserve_cache(model: Any, capacity: int) -> DynamicCache | None:
    """A cache with room for `capacity` tokens, or None where the model is to make its own.

    A layer with a window keeps all tokens here; its mask hides those that are too far away.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if paths_of(model).attention != GROUPED or not kinds <= ATTENTION_LAYERS:
        return None
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for _ in range(config.num_hidden_layers):
        layer = _Layer()
        layer.capacity = capacity
        cache.layers.append(layer)
    return cache


PROMPT_TOKENS = 4096  # distinct tokens of prompts that go through together
NUCLEUS = 256  # sorting the whole vocabulary took 255 ms a step (96 rows of 49k, two cores), the first 256 take 9


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row, and the logarithm of its probability. logits: (batch, vocabulary); uniform: (batch,) in [0, 1).

    top_p: only the most probable tokens are drawn from, as many as it takes to hold that much probability. The
    probability given is that among all tokens, at this temperature. Returns (batch,), (batch,).
    """
    probabilities = (logits.float() / (temperature or 1)).softmax(-1)
    if temperature == 0:
        best = logits.argmax(-1)
        return best, probabilities.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
    every, order = probabilities, None
    if top_p < 1:
        size, count = probabilities.shape[-1], NUCLEUS
        first, order = probabilities.topk(min(count, size), -1)
        while count < size and bool((first.sum(-1) < top_p).any()):  # a flat row: its nucleus is wider
            count *= 8
            first, order = probabilities.topk(min(count, size), -1)
        before = first.cumsum(-1) - first
        probabilities = first.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform.to(torch.float64).unsqueeze(-1) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.shape[-1] - 1)
    if order is not None:
        picked = order.gather(-1, picked)
    return picked.squeeze(-1), every.gather(-1, picked).squeeze(-1).log()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of the tokens seen divided by the penalty where positive, multiplied by it where negative.

    logits, seen: (batch, vocabulary). Keskar et al. 2019 (arXiv 1909.05858), section 4.1, as transformers does it.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclass
class Generated:
    row: int
    ids: list[int]  # without the end token
    ended: bool
    end: int | None = None  # the end token that was sampled
    logprobs: list[float] = field(default_factory=list)  # of each token, the end token's included


def left_pad(rows: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """ids and mask, both (batch, longest)."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """The cache of these rows, in this order; a row may be taken more than once."""
    own = [layer for layer in cache.layers if isinstance(layer, _Layer)]
    for layer in own:
        layer.keep(rows)
    if not own:
        cache.batch_select_indices(rows)


def _shrinks(cache: Any) -> bool:
    """Whether rows can be taken out of the cache: linear attention and convolutions keep a state that has no such method."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


@torch.no_grad()
def decode(
    model: Any,
    prompts: list[list[int]],
    uniforms: Tensor,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    end: Collection[int],
    pad: int = 0,
) -> list[Generated]:
    """Continue each prompt until an end token or `max_tokens`.

    prompts: token ids. uniforms: (len(prompts), max_tokens) in [0, 1): each row's own randomness, so a text does
    not depend on which other prompts are in the batch. Returns one `Generated` a prompt, in order.
    """
    paths = paths_of(model)
    if not paths.padded and len(lengths := {len(p) for p in prompts}) > 1:
        found: dict[int, Generated] = {}
        for length in sorted(lengths):
            rows = [i for i, p in enumerate(prompts) if len(p) == length]
            part = decode(
                model, [prompts[i] for i in rows], uniforms[rows], max_tokens=max_tokens, temperature=temperature,
                top_p=top_p, repetition_penalty=repetition_penalty, end=end, pad=pad,
            )  # fmt: skip
            found |= {i: replace(g, row=i) for i, g in zip(rows, part, strict=True)}
        return [found[i] for i in range(len(prompts))]
    device = model.device
    done = [Generated(i, [], ended=False) for i in range(len(prompts))]
    alive = torch.arange(len(prompts), device=device)
    uniforms = uniforms.to(device)
    ends = torch.tensor(sorted(end), device=device)
    shared = paths.fits(max(map(len, prompts)) + max_tokens)
    quick = lean(model) if shared else None
    cache, logits, mask = (
        _read_prompts(model, quick, prompts, max_tokens) if shared else _read_padded(model, prompts, pad, max_tokens)
    )
    positions = mask.sum(-1, keepdim=True) - 1
    together, idle = is_shared(model), False  # idle: nothing of its own is left, it goes on for the other processes
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        seen[:, ends] = False  # an answer may always end
    for step in range(max_tokens):
        if seen is not None:
            logits = penalise(logits, seen[alive], repetition_penalty)
        token, logprob = sample(logits, uniforms[alive, step], temperature, top_p)
        stopped = torch.isin(token, ends)
        step_of_row = (x.tolist() for x in (alive, token, logprob, stopped))
        for row, value, logp, stop in zip(*step_of_row, strict=True) if not idle else ():
            if done[row].ended:  # goes on where rows cannot be taken out of the cache
                continue
            done[row].logprobs.append(logp)
            if stop:
                done[row].ended, done[row].end = True, value
            else:
                done[row].ids.append(value)
        if seen is not None:
            seen[alive, token] = True
        positions = positions + 1
        if stopped.any() and not idle and not _shrinks(cache):
            idle = all(g.ended for g in done)
        elif stopped.any() and not idle:
            keep = (~stopped).nonzero().squeeze(-1)
            idle = keep.numel() == 0
            if idle:
                keep = torch.zeros_like(alive[:1])
            alive, token, mask, positions = alive[keep], token[keep], mask[keep], positions[keep]
            _keep_rows(cache, keep)
        if not distributed.all_reduce_number(not idle) if together else idle:
            break
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=-1)
        if step + 1 < max_tokens:
            cache, logits = _one_more(model, quick, cache, token, mask, positions)
    return done


def _one_more(
    model: Any, quick: Lean | None, cache: DynamicCache, token: Tensor, mask: Tensor, positions: Tensor
) -> tuple[DynamicCache, Tensor]:
    """The cache and the scores, (batch, vocabulary), after one token more of each row.

    token: (batch,). mask: (batch, tokens), the new one included. positions: (batch, 1).
    """
    if quick is None:
        out = forward(
            model, input_ids=token.unsqueeze(-1), attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=FIRST.to(model.device),
        )  # fmt: skip
        return out.past_key_values, out.logits[:, -1]
    hidden = (mask == 0)[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
        # One sequence of many rows' tokens becomes many sequences of one token.
        keys, values = cache.update(k.transpose(0, 2), v.transpose(0, 2), block)
        return _last_token(q.transpose(0, 2), keys, values, hidden, scaling).transpose(0, 1)

    return cache, quick(token, positions.squeeze(-1), attend, range(len(token)))


# An index, not a count: of a slice's states torch multiplies a frozen head per row, on copies of it (2.7 GB).
FIRST = torch.zeros(1, dtype=torch.long)


def _read_prompts(
    model: Any, quick: Lean | None, prompts: list[list[int]], room: int
) -> tuple[DynamicCache, Tensor, Tensor]:
    """A cache that holds the prompts, with room for so many tokens more; the scores after each prompt; and its mask.

    (prompts, vocabulary), (prompts, longest); shorter prompts stand on the right. Prompts that begin alike (a system message,
    shown examples, the same prompt many times) go through as a tree: what they share is computed once, and no padding.
    """
    longest = max(map(len, prompts))
    cache = reserve_cache(model, longest + room)
    if cache is None:
        raise NotUnderstood("not all of its layers are attention")
    own = [layer for layer in cache.layers if isinstance(layer, _Layer)]
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    logits = None
    parts = tree.in_parts(prompts, PROMPT_TOKENS)
    for part, _ in distributed.synchronised_steps(
        parts, parts[0], is_shared(model)
    ):  # reading a part twice changes nothing
        made, number = tree.as_tree([prompts[i] for i in part])
        places = torch.zeros(len(part), longest, dtype=torch.long)  # of padding: any, the mask hides it
        for row, i in enumerate(part):
            places[row, longest - len(prompts[i]) :] = torch.from_numpy(made.places(number[row]))
            mask[i, longest - len(prompts[i]) :] = 1
        filled, found = _read_tree(model, quick, made, places[:, -1])
        if logits is None:
            logits = found.new_empty(len(prompts), found.shape[-1])
        rows, at = torch.tensor(part, device=model.device), places.to(model.device)
        logits[rows] = found
        for layer, whole in zip(own, filled.layers, strict=True):
            layer.take(rows, len(prompts), longest, *(x[0][:, at].transpose(0, 1) for x in (whole.keys, whole.values)))
    assert logits is not None
    return cache, logits, mask.to(model.device)


def _read_tree(model: Any, quick: Lean | None, made: tree.Tree, reads: Tensor) -> tuple[Any, Tensor]:
    """A cache of the tree's tokens, and the scores at the places `reads`, (reads, vocabulary)."""
    with tree.laid_out(made, 0, torch.empty(0, dtype=model.dtype, device=model.device)):
        filled = DynamicCache()  # not the model's own kind: one with windows would forget
        if quick is None:
            ids, positions = (torch.tensor([x], device=model.device) for x in (made.ids, made.positions))
            keep = reads.to(model.device)
            out = forward(
                model, input_ids=ids, position_ids=positions, past_key_values=filled, use_cache=True,
                logits_to_keep=keep,
            )  # fmt: skip
            return filled, out.logits[0]

        def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
            return tree.tree_attention(q, *filled.update(k, v, block), scaling)

        return filled, quick(made.ids, made.positions, attend, reads.tolist())


def _read_padded(model: Any, prompts: list[list[int]], pad: int, room: int) -> tuple[DynamicCache, Tensor, Tensor]:
    """The same for any architecture: each different prompt once, padded on the left."""

    def read(rows: list[list[int]]) -> tuple[DynamicCache, Tensor, Tensor]:
        ids, mask = left_pad(rows, pad, model.device)
        reserved = reserve_cache(model, ids.shape[1] + room)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        last = torch.tensor([ids.shape[1] - 1], device=model.device)
        out = forward(
            model, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=reserved, use_cache=True,
            logits_to_keep=last,
        )  # fmt: skip
        return out.past_key_values, out.logits[:, -1], mask

    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    cache, logits, mask = read(distinct)
    if len(distinct) < len(prompts) and not _shrinks(cache):
        return read(prompts)
    if len(distinct) < len(prompts):
        number = {tuple(p): n for n, p in enumerate(distinct)}
        copies = torch.tensor([number[tuple(p)] for p in prompts], device=model.device)
        logits, mask = logits[copies], mask[copies]
        _keep_rows(cache, copies)
    return cache, logits, mask
