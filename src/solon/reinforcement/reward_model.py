"""The reward model: Bradley–Terry on soft labels.

A sequence classifier with one output reads a whole conversation and gives a score; P(chosen is better) is the
sigmoid of the difference of two scores. The loss is the cross-entropy against the judge's probability, so a label
of 0.5 pulls the two scores together and teaches no preference (Bai et al. 2022, section 4.1: soft labels work
better than hard ones). After training the scores are shifted and scaled to mean 0 and standard deviation 1 on
reference responses: KL coefficients then mean the same for every reward model.

Several adapters on one trunk, trained from different seeds, are an ensemble; where they disagree the score can be
lowered (Coste et al. 2024, arXiv 2310.02743).
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solon import distributed
from solon.errors import Diverged, InputError, Unfit
from solon.models.batching import distinct_tokens, split_rows
from solon.models.chat.encode import chat_ids_and_turns
from solon.models.chat.limits import Limit, context_limit
from solon.models.forward import base_of
from solon.models.loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    explain_errors,
    join_names,
    load_checked,
    not_finite,
    read_json,
    tensor_shapes,
)
from solon.models.lora import add_adapters, exact_names
from solon.models.passes import fuse_adapters, last_hidden_states
from solon.models.paths import record_path
from solon.models.settings import AdapterSettings
from solon.models.sharding import is_sharded, place_model
from solon.models.weights import (
    check_vocabulary,
    device,
    directory_of,
    load_tokenizer,
    model_fingerprint,
    resolve_dtype,
)
from solon.records import Chat, Comparison
from solon.reinforcement.settings import RewardSettings
from solon.training.loop import Fitted, fit, fitting
from solon.training.saving import save_merged
from solon.training.settings import Progress

NORMALISATION = "solon_reward.json"
ADAPTERS = "adapters"  # of each member, on the model that training started from; the first is merged into the weights
HEAD = "score.weight"
HEAD_RATE = 10  # the new head learns this many times as fast as the adapters
TIE = 1e-6  # a label this near to 0.5 is a tie


def preference_loss(
    chosen: Tensor, rejected: Tensor, label: Tensor, margin: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Weighted mean cross-entropy of sigmoid(chosen - rejected) against the soft label.

    chosen, rejected: scores, (pairs,). label: P(chosen is better), (pairs,). Returns a scalar, nats.
    margin: the difference must exceed it before a certain label is content (Touvron et al. 2023, arXiv 2307.09288,
    section 3.2.2); scaled by how sure the label is, so that turning the pair round turns it too.
    """
    apart = chosen - rejected - margin * (2 * label - 1)
    losses = F.binary_cross_entropy_with_logits(apart, label, reduction="none")
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


@dataclass
class Member:
    """One of the ensemble. `mean` and `std` are those of its raw score on the reference responses."""

    head: Any  # hidden state → raw score
    adapter: str | None = None  # its name on the trunk; None: whatever is active
    mean: float = 0.0
    std: float = 1.0


class RewardModel:
    """Scores conversations, in standard deviations of the score on the reference responses."""

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None, members: Sequence[Member], penalty: float = 0.0
    ) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.members, self.penalty = list(members), penalty
        self.limit = context_limit(model.config, tokenizer)
        self.lower: Any = None  # the lower blocks that it shares with a policy

    @classmethod
    def load(cls, where: str, dtype: str = "auto", on: str | None = None) -> RewardModel:
        """on: the device; None: this process's."""
        from transformers import AutoModelForSequenceClassification

        kept, adapters, wanted = _kept(where), Path(where) / ADAPTERS, resolve_dtype(dtype, where)
        apart = adapters.is_dir() and (wanted != torch.float32 or len(kept["members"]) > 1)
        model: Any = load_checked(
            AutoModelForSequenceClassification, where, dtype=torch.float32 if apart else wanted
        )  # fmt: skip
        tokenizer, place = load_tokenizer(where), torch.device(on) if on else device()
        model.config.pad_token_id = tokenizer.pad_token_id
        if apart:  # as it was trained: members share the bare trunk, and rounded with it adapters would be lost in part
            what = f"{where}: its members cannot be loaded"
            explain_errors(what, lambda: _take_off(model, adapters / "0"))
            for p in model.parameters():  # and no buffer: rotary frequencies stay exact
                p.data = p.data.to(wanted)
            record_path(where, model.to(place))
            return cls(*explain_errors(what, lambda: _with_members(model, tokenizer, kept, adapters, "member")))
        record_path(where, model.to(place))
        model.score.float()  # the trunk may be bfloat16; the score is not rounded
        members = [Member(model.score, **kept["members"][0])]
        return cls(model.eval(), tokenizer, kept["system"], members, kept["uncertainty_penalty"])

    @classmethod
    def upon(cls, policy: Any, tokenizer: Any, where: str, model: str) -> RewardModel | None:
        """The reward model as adapters on the policy's own trunk, or None where it was trained from another one.

        policy: a PEFT model, made from `model`. No second set of weights is held.
        """
        kept = _kept(where)
        if kept["base"] is None or kept["base"] != model_fingerprint(model):
            return None
        adapters, what = Path(where) / ADAPTERS, f"{where}: its members cannot be loaded"
        return cls(*explain_errors(what, lambda: _with_members(policy, tokenizer, kept, adapters, "reward")))

    def share(self, lower: Any) -> None:
        """Share a policy's lower blocks, where this is adapters on the policy's trunk, and none lower."""
        if lower and lower.serves(self.model, [m.adapter or "" for m in self.members]):
            self.lower = lower

    def rows(self, conversations: Sequence[Chat]) -> list[list[int]]:
        return [self.ids(c) for c in conversations]

    def ids(self, conversation: Chat, limit: Limit | None = None) -> list[int]:
        """Token ids of a conversation that ends with the assistant's turn, up to its end-of-turn token.

        limit: the model's context where none is given. Raises Unfit beyond it: cut at its beginning a conversation would
        lose its system message, cut at its end the response that is scored.
        """
        limit = limit or self.limit
        ids, spans = chat_ids_and_turns(self.tokenizer, conversation, system=self.system, limit=limit)
        limit.check(spans[-1][1])
        return ids[: spans[-1][1]]

    def unfit(self, conversation: Chat) -> str | None:
        """Why the model cannot score a conversation; None where it can."""
        try:
            self.ids(conversation)
        except Unfit as error:
            return str(error)
        return None

    def raw(self, rows: Sequence[list[int]], member: int = 0) -> Tensor:
        """Raw scores, (rows,), float32, read at each row's last token.

        The classifier's own head looks for the last token that is not the pad token, which is the wrong place
        where pad = eos; so Solon reads the place itself.
        """
        part = self.members[member]
        with _speaking(self.model, part.adapter):
            states_of = self.lower.hidden_states if self.lower else None
            states = last_hidden_states(self.model, rows, self.tokenizer.pad_token_id, states_of)
        return part.head(states.float()).squeeze(-1).float()

    def score(self, conversations: Sequence[Chat]) -> list[float]:
        """Normalised scores, in the order given: the members' mean, less the penalty where they disagree."""
        scores = self.by_member(conversations)
        apart = [statistics.stdev(s) if len(s) > 1 else 0.0 for s in scores]
        return [statistics.fmean(s) - self.penalty * d for s, d in zip(scores, apart, strict=True)]

    def by_member(self, conversations: Sequence[Chat]) -> list[list[float]]:
        """Of each conversation, each member's normalised score."""
        rows = self.rows(conversations)
        columns = [[(raw - m.mean) / m.std for raw in self.raw_scores(rows, n)] for n, m in enumerate(self.members)]
        return [list(scores) for scores in zip(*columns, strict=True)]

    @torch.no_grad()
    def raw_scores(self, rows: Sequence[list[int]], member: int = 0) -> list[float]:
        out = [0.0] * len(rows)
        if self.lower:
            self.lower.add(rows)
        parts = split_rows(rows, 4096)
        for part, _ in distributed.synchronised_steps(parts, parts[0] if parts else [], is_sharded(self.model)):
            for i, value in zip(part, self.raw([rows[i] for i in part], member).tolist(), strict=True):
                out[i] = value
        return out

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[float]:
        """P(chosen is better) of each as the model sees it, 0..1: the mean of the members'."""
        chats = [(*c.prompt, *c.chosen) for c in comparisons] + [(*c.prompt, *c.rejected) for c in comparisons]
        rows = self.rows(chats)
        n = len(comparisons)
        columns = []
        for k in range(len(self.members)):
            raw = torch.tensor(self.raw_scores(rows, k))
            columns.append((raw[:n] - raw[n:]).sigmoid())
        return torch.stack(columns).mean(0).tolist()


def _with_members(
    trunk: Any, tokenizer: Any, kept: dict[str, Any], adapters: Path, name: str
) -> tuple[Any, Any, str | None, list[Member], float]:
    """What makes a RewardModel of a trunk that training started from, and the members' adapters."""
    members = []
    for n, found in enumerate(kept["members"]):
        trunk = _put_on(trunk, f"{name}-{n}", adapters / str(n))
        members.append(Member(_head(adapters / str(n)).to(trunk.device), f"{name}-{n}", **found))
    return trunk.eval(), tokenizer, kept["system"], members, kept["uncertainty_penalty"]


def _take_off(model: Any, path: Path) -> None:
    """Take an adapter out of the weights that it was merged into."""
    from peft import LoraConfig

    config, weights = LoraConfig.from_pretrained(str(path)), _tensors(path)
    for name, a in weights.items():
        if name.endswith(".lora_A.weight"):
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            change = (config.lora_alpha / config.r) * (b @ a)
            layer.weight.data -= change.T if config.fan_in_fan_out else change


def _kept(where: str) -> dict[str, Any]:
    path = Path(where) / NORMALISATION
    if not path.is_file():
        raise InputError(f"{where}: not a reward model written by Solon (no {NORMALISATION} in it)")
    kept = read_json(path)
    one = {"mean": kept.get("mean"), "std": kept.get("std")}
    found = {"base": None, "system": None, "uncertainty_penalty": 0.0, "members": [one], **kept}
    members: Any = found["members"]
    if not isinstance(members, list) or not members or not all(isinstance(m, dict) for m in members):
        raise InputError(f"{path}: not written by Solon (members is a list of objects)")
    numbers = [m.get(name) for m in members for name in ("mean", "std")] + [found["uncertainty_penalty"]]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or not all(
        m["std"] > 0 for m in members
    ):
        raise InputError(
            f"{path}: a mean or standard deviation of its scores is no finite number; train the model again"
        )
    if not all(isinstance(found[name], str | None) for name in ("base", "system")):
        raise InputError(f"{path}: not written by Solon (base and system are texts or null)")
    return {
        "base": found["base"],
        "system": found["system"],
        "uncertainty_penalty": found["uncertainty_penalty"],
        "members": [{"mean": m["mean"], "std": m["std"]} for m in members],
    }


@contextmanager
def _speaking(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside, the trunk with that adapter. What learns stays what it was: PEFT would change it with the adapter."""
    if adapter is None:
        yield
    else:
        before, learned = model.active_adapter, [p.requires_grad for p in model.parameters()]
        model.set_adapter(adapter)
        try:
            yield
        finally:
            model.set_adapter(before)
            for p, learns in zip(model.parameters(), learned, strict=True):
                p.requires_grad_(learns)


def _put_on(model: Any, name: str, path: Path) -> Any:
    """The model with the adapter of `path` under a name, to be read only."""
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(path))
    weights = {k: v for k, v in _tensors(path).items() if ".lora_" in k}
    config.task_type = config.modules_to_save = None
    if isinstance(model, PeftModel):
        learned = {id(p) for p in model.parameters() if p.requires_grad}
        with exact_names():
            model.add_adapter(name, config)
    else:
        with exact_names():
            learned, model = set(), get_peft_model(model, config, adapter_name=name)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    for p in model.parameters():
        p.requires_grad_(id(p) in learned)
    return fuse_adapters(model)


def _tensors(path: Path) -> dict[str, Tensor]:
    """A member's tensors. Raises InputError where they are damaged or not finite."""
    from safetensors.torch import load_file

    where = path / ADAPTER_WEIGHTS
    if not where.is_file() or not (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"{path}: not a whole member of a reward model; train the model again")
    read_json(path / ADAPTER_CONFIG)
    tensor_shapes(where)
    found = load_file(where)
    if bad := not_finite(found.items()):
        raise InputError(f"{where}: not every number in it is finite: {join_names(bad)}")
    return found


def _head(path: Path) -> nn.Module:
    weights = [v for k, v in _tensors(path).items() if k.endswith(HEAD)]
    if len(weights) != 1:
        raise InputError(f"{path / ADAPTER_WEIGHTS}: holds no {HEAD}; train the reward model again")
    [weight] = weights
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight = nn.Parameter(weight.float(), requires_grad=False)
    return head


# --- training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Example:
    chosen: list[int]
    rejected: list[int]
    label: float
    weight: float


def train_reward_model(
    comparisons: Sequence[Comparison],
    model: str,
    out: Path,
    *,
    settings: RewardSettings,
    adapter: AdapterSettings | None,
    system: str | None,
    reference: Sequence[Chat],
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on comparisons that carry a label (abstentions are left out); write the model to `out`.

    model: the causal LM to start from. reference: conversations ending in a response, on which the score is
    normalised. Returns counts and losses (nats per pair; of the first member).
    """
    from transformers import AutoModelForSequenceClassification

    if adapter is None and settings.members > 1:
        raise InputError("reward_model.members: an ensemble is made of adapters; give an adapter, or set members to 1")
    weights = {source: settings.weights.get(source, 1.0) for source in ("ai", "human")}
    labelled = [c for c in comparisons if c.label is not None and weights[c.labeler]]
    decided = [c for c in labelled if settings.ties == "equal" or abs(float(c.label or 0) - 0.5) > TIE]
    if not decided:
        raise InputError("no comparison is left to learn from: each one is an abstention, a tie, or of weight 0")
    where = directory_of(model)
    tokenizer = load_tokenizer(where)
    lm: Any = load_checked(
        AutoModelForSequenceClassification,
        where,
        new=[HEAD],  # learned from the comparisons
        extra=["lm_head."],  # not a classifier's
        num_labels=1,
        dtype=resolve_dtype(dtype, where, "training") if adapter else torch.float32,
    )
    check_vocabulary(lm, tokenizer)
    lm = place_model(lm, device()) if adapter else lm.to(device())
    lm.config.pad_token_id = tokenizer.pad_token_id
    record_path(model, lm)
    asked = RewardModel(lm, tokenizer, system, [Member(lm.score)])
    limit = asked.limit.at_most(settings.max_length, "max_length")

    def encode(c: Comparison) -> _Example:
        chosen, rejected = (asked.ids((*c.prompt, *side), limit) for side in (c.chosen, c.rejected))
        return _Example(chosen, rejected, float(c.label or 0), weights[c.labeler])

    encoded, left_out = fitting("comparison", decided, encode)
    reference = [c for c in reference if asked.unfit(c) is None]
    aside = Path(tempfile.mkdtemp(prefix="solon-reward-"))
    kept: list[dict[str, float]] = []
    fitted: list[Fitted] = []  # of each member, the first one last
    try:
        # The first member last: it is the one that is on the trunk when the whole model is written.
        for n in reversed(range(settings.members)):
            torch.manual_seed(seed + n)
            torch.nn.init.zeros_(lm.score.weight)  # every response starts at 0: no preference before the first label
            learner = add_adapters(lm, adapter, task="SEQ_CLS") if adapter else lm
            base_of(learner).score.float()
            rewards = RewardModel(learner, tokenizer, system, [Member(base_of(learner).score)])
            fitted.append(
                _train_member(rewards, encoded, settings, seed + n, _of_members(progress, settings.members, n))
            )
            rows = rewards.rows(reference)
            raw = torch.tensor(rewards.raw_scores(rows)) if rows else torch.tensor([-1.0, 1.0])
            if not torch.isfinite(raw).all():
                raise Diverged(f"{out}: not written, since the trained model gives scores that are no finite numbers")
            kept.insert(0, {"mean": raw.mean().item(), "std": max(raw.std().item(), 1e-6) if len(raw) > 1 else 1.0})
            if adapter:
                learner.save_pretrained(aside / str(n))
                if n:
                    lm = learner.unload()
        about = {
            **kept[0],
            "reference_responses": len(reference),
            "system": system,
            "base": model_fingerprint(model) if adapter else None,
            "members": kept,
            "uncertainty_penalty": settings.uncertainty_penalty,
        }

        def also(made: Path) -> None:
            (made / NORMALISATION).write_text(json.dumps(about, indent=1))
            if adapter:
                shutil.copytree(aside, made / ADAPTERS)

        save_merged(learner, tokenizer, out, base=where if adapter else None, also=also)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {
        "comparisons": len(encoded),
        "left_out": left_out,
        "abstained": sum(c.label is None for c in comparisons),
        "ties_skipped": len(labelled) - len(decided),
        "steps": sum(len(f.losses) for f in fitted),
        "tokens": settings.members * settings.epochs * sum(len(e.chosen) + len(e.rejected) for e in encoded),
        **fitted[-1].to_json(),
        **({"stopped": stopped} if (stopped := next((f.stopped for f in fitted if f.stopped), None)) else {}),
        "reference_mean": kept[0]["mean"],
        "reference_std": kept[0]["std"],
    }


def _train_member(
    rewards: RewardModel, examples: Sequence[_Example], settings: RewardSettings, seed: int, progress: Progress | None
) -> Fitted:
    def loss(batch: Sequence[_Example]) -> Tensor:
        scores = rewards.raw([e.chosen for e in batch] + [e.rejected for e in batch])
        label = torch.tensor([e.label for e in batch], device=scores.device)
        weight = torch.tensor([e.weight for e in batch], device=scores.device)
        return preference_loss(scores[: len(batch)], scores[len(batch) :], label, settings.margin, weight)

    learned = [(n, p) for n, p in rewards.model.named_parameters() if p.requires_grad]
    head = [p for n, p in learned if "score" in n]
    fitted = fit(
        examples,
        loss,
        [
            {"params": [p for n, p in learned if "score" not in n]},
            {"params": head, "lr": settings.learning_rate * HEAD_RATE},
        ],
        settings=settings,
        tokens=lambda e: distinct_tokens([e.chosen, e.rejected]),
        weight=lambda e: e.weight,
        seed=seed,
        progress=progress,
    )
    rewards.model.eval()
    return fitted


def _of_members(progress: Progress | None, members: int, n: int) -> Progress | None:
    if progress is None:
        return None
    return lambda at, of, shown: progress((members - 1 - n) * of + at, members * of, shown)
