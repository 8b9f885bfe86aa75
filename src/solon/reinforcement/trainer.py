"""The PPO loop: wires the functions of `ppo.py` to models.

Policy, reference, reward and values are one trunk with adapters: the reference is the policy with its adapters switched
off, a reward model that was trained from the same weights is a second set of them (`reward_model.py`), and the value head is
a linear map of the policy's states. The reward may be any other function of conversations, such as a judge's rating.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from solon import distributed
from solon.engines.identity import of_model
from solon.errors import InputError
from solon.identity import of_records
from solon.models.chat.encode import answer_text, chat_ids, end_ids
from solon.models.chat.limits import context_limit
from solon.models.decoding import Generated
from solon.models.lora import add_adapters
from solon.models.passes import lower_blocks
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import Chat, Prompt, RolloutSummary, assistant, fingerprint
from solon.reinforcement.checkpoint import Kept, State, pack, restore, save
from solon.reinforcement.monitors import Check, Watch, of_texts
from solon.reinforcement.ppo import AdaptiveKL
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.rollout import Rollouts, sample
from solon.reinforcement.settings import GROWS, PPOSettings
from solon.reinforcement.update import learn
from solon.training.finite import LastGood
from solon.training.loop import fitting
from solon.training.saving import give_memory_back, save_merged
from solon.training.settings import Log, Progress

Reward = Callable[[Sequence[Chat]], Sequence[float]]


def ppo(
    prompts: Sequence[Prompt],
    model: str,
    reward: Reward | str,
    out: Path,
    *,
    settings: PPOSettings,
    adapter: AdapterSettings,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    checkpoint: Path | None = None,
    watch: Watch | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> Iterator[RolloutSummary]:
    """Train `model` to earn `reward` while staying near itself; one summary an update, then the model in `out`.

    reward: one score a conversation, in units of about one standard deviation; or the directory of a reward model,
    which becomes adapters on the same trunk where it was trained from `model`. checkpoint: a directory written after
    every `checkpoint_every` updates; where it holds one, training goes on from there, and on a CPU along the same path.
    watch: asked every `check_every` updates; where its last check finds the reward gamed, the policy of its best check
    is what is written. log: takes each summary's numbers and the updates done. more: what else made the training, such as
    the judge behind `reward`; a checkpoint of another one is refused.
    """
    trainer = Trainer(prompts, model, reward, settings, adapter, system, seed, dtype, watch, more or {})
    trainer.begin(checkpoint)
    unsaved: Kept | None = None
    try:
        while trainer.state.update < settings.updates and not trainer.over:
            summary = trainer.update()
            unsaved = trainer.pack() if checkpoint else None
            give_memory_back()
            if log:
                log(summary.numbers(), trainer.state.update)
            yield summary  # before it counts as done: a kill in between makes it once more, and the same
            due = trainer.last or trainer.state.update % settings.checkpoint_every == 0
            if checkpoint and unsaved and due:
                save(checkpoint, unsaved)
                unsaved = None
            if progress:
                shown = {"reward": float(summary.reward or 0), "kl": trainer.state.kl_seen}
                progress(trainer.state.update, settings.updates, shown)
    except BaseException:  # Ctrl-C, a judge that fails: the whole updates since the last checkpoint are not lost
        if checkpoint and unsaved:
            save(checkpoint, unsaved)
        raise
    trainer.write(out)


class Trainer:
    """A training: what does not change from update to update, and what an update does."""

    sampler = staticmethod(sample)  # contexts → responses; another one may sample elsewhere

    def __init__(
        self,
        prompts: Sequence[Prompt],
        model: str,
        reward: Reward | str,
        settings: PPOSettings,
        adapter: AdapterSettings,
        system: str | None,
        seed: int,
        dtype: str,
        watch: Watch | None,
        more: Mapping[str, Any],
    ) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.watch = watch if settings.check_every else None
        probing = len(self.watch.probes) if self.watch else settings.rollouts
        if distributed.is_sharded() and min(settings.rollouts, probing) < distributed.world_size():
            raise InputError(
                f"--use_fsdp with {distributed.world_size()} processes needs as many rollouts (and probes) at least"
            )
        policy, self.tokenizer = load_causal_lm(model, dtype=dtype, learns=True)
        torch.manual_seed(seed)
        self.policy = add_adapters(policy, adapter).eval()  # eval throughout: no dropout in any role
        self.rewards: RewardModel | None = None
        if isinstance(reward, str):
            on_policy = RewardModel.upon(self.policy, self.tokenizer, reward, model)
            self.rewards = on_policy or RewardModel.load(reward, dtype)
            self.score: Reward = self.rewards.score
        else:
            self.score = reward
        self.lower = lower_blocks(self.policy, self.tokenizer.pad_token_id)
        if self.rewards:
            self.rewards.share(self.lower)
        self.state = start_state(self.policy, settings, self.rewards)
        self.identity = {
            "model": of_model(model),
            "reward": of_model(reward) if isinstance(reward, str) else "a function",
            "prompts": of_records(prompts),
            "adapter": adapter.model_dump(),
            "system": system,
            "seed": seed,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "settings": settings.model_dump(exclude=GROWS),
            "probes": of_records(self.watch.probes) if self.watch else None,
            **more,
        }
        limit = context_limit(self.policy.config, self.tokenizer).less(settings.max_tokens, "the response")

        def encode(p: Prompt) -> tuple[Prompt, list[int]]:
            if self.rewards:
                room = self.rewards.limit.less(settings.max_tokens, "the response")
                self.rewards.ids((*p.prompt, assistant("")), room)
            return p, chat_ids(self.tokenizer, p.prompt, system=system, limit=limit)

        readable, self.left_out = fitting("prompt", prompts, encode)
        self.prompts, self.contexts = [p for p, _ in readable], {p.id: ids for p, ids in readable}
        self._encode = encode

    def begin(self, checkpoint: Path | None) -> None:
        """Take up what the checkpoint holds; without one, let the policy answer the probe prompts before it learns."""
        restore(checkpoint, self.state, self.watch, self.identity)
        if self.watch:
            answerable, _ = fitting("probe prompt", self.watch.probes, self._encode)
            self.watch.probes, self.probes = [p for p, _ in answerable], [ids for _, ids in answerable]
            if not self.watch.checks:
                self.check()

    @property
    def over(self) -> bool:
        """Whether training ends before its last update: numbers not finite, beyond the KL bound, or the reward is gamed."""
        if self.state.good.stopped is not None:
            return True
        gamed = self.settings.stop_when_gamed and self.watch is not None and self.watch.checks[-1].gamed
        return gamed or not self.state.kl_seen <= self.settings.kl_bound

    @property
    def last(self) -> bool:
        """Whether the update that was made is the last one."""
        return self.state.update == self.settings.updates or self.over

    def respond(self, contexts: list[list[int]], seed: int) -> tuple[list[Generated], list[str]]:
        """A response to each context, as tokens and as text."""
        completions = self.sampler(
            self.policy, contexts, seed=seed, max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature, ends=end_ids(self.tokenizer), pad=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return completions, [answer_text(self.tokenizer, c.ids)[0] for c in completions]

    def check(self) -> Check:
        """Let the policy answer the probe prompts; keep its adapters where the answers are the best so far."""
        assert self.watch is not None
        _, texts = self.respond(self.probes, _number(self.seed, "probes"))
        found = self.watch.check(self.state.update, texts, partial(_scored, self.score))
        self._forget()
        if self.watch.best is found:
            learned = ((n, p) for n, p in self.policy.named_parameters() if p.requires_grad)
            self.state.best = {n: p.detach().clone() for n, p in learned}
        return found

    def update(self) -> RolloutSummary:
        """Sample, score and learn once."""
        state, settings, number = self.state, self.settings, self.state.update
        different = draw_prompts(self.prompts, settings.rollouts // settings.responses_per_prompt, number, self.seed)
        drawn = [p for p in different for _ in range(settings.responses_per_prompt)]
        contexts = [self.contexts[p.id] for p in drawn]
        completions, texts = self.respond(contexts, _number(self.seed, number))
        responses = [c.ids + ([] if c.end is None else [c.end]) for c in completions]
        rollouts = Rollouts(contexts, responses, self.tokenizer.pad_token_id, self.policy.device, self.lower)
        chats = [(*p.prompt, assistant(t)) for p, t in zip(drawn, texts, strict=True)]
        own = distributed.local_indices(len(chats))
        if self.lower:
            shares = self.rewards is not None and self.rewards.lower is not None
            scored = self.rewards.rows([chats[i] for i in own]) if self.rewards and shares else []
            self.lower.add([*(rollouts.rows[i] for i in own), *scored])
        raw = torch.tensor(_scored(self.score, chats))
        ended = torch.tensor([c.ended for c in completions])
        summary = learn(state, rollouts, raw, ended, settings, random.Random(_number(self.seed, number)))
        self._forget()
        state.update += 1
        state.kl_seen = float(summary.kl_nats or 0)
        due = self.watch is not None and (self.last or state.update % settings.check_every == 0)
        check = self.check().summary() if due else None
        meta = {**summary.meta, "prompt_tokens": sum(map(len, contexts)), "left_out": self.left_out}
        return summary.model_copy(update={"watched": of_texts(texts), "check": check, "meta": meta})

    def pack(self) -> Kept | None:
        """What a checkpoint holds; None where nothing is to be kept."""
        kept = distributed.is_main() and self.state.good.stopped is None
        return pack(self.state, self.watch, self.identity) if kept else None

    def write(self, out: Path) -> None:
        """Write the policy; where the last check found the reward gamed, that of the best check."""
        if self.watch and self.watch.checks[-1].gamed:
            with torch.no_grad():
                for name, parameter in self.policy.named_parameters():
                    if name in self.state.best:
                        parameter.copy_(self.state.best[name])
        save_merged(self.policy, self.tokenizer, out, base=resolve(self.model))

    def _forget(self) -> None:
        if self.lower:
            self.lower.forget()


def _scored(score: Reward, chats: Sequence[Chat]) -> list[float]:
    """A reward a conversation; of several processes each asks for its part."""
    found = score([chats[i] for i in distributed.local_indices(len(chats))])
    return distributed.all_gather([float(x) for x in found], len(chats))


def start_state(policy: Any, settings: PPOSettings, rewards: RewardModel | None) -> State:
    values = torch.nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
    torch.nn.init.zeros_(values.weight)
    torch.nn.init.zeros_(values.bias)
    if settings.value_start == "reward-model":
        if rewards is None:
            raise InputError("ppo.value_start: reward-model needs a reward model; the reward is another here")
        part = rewards.members[0]
        if part.head.weight.shape != values.weight.shape:
            raise InputError("ppo.value_start: the reward model is of another width than the policy; set it to zero")
        with torch.no_grad():
            values.weight.copy_(part.head.weight / part.std)
            values.bias.fill_(-part.mean / part.std)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in policy.parameters() if p.requires_grad], "lr": settings.learning_rate},
            {"params": values.parameters(), "lr": settings.value_learning_rate},
        ],
        weight_decay=0.0,
        eps=1e-5,  # Huang et al. 2024, detail 9
    )
    horizon = 8 * settings.rollouts
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    kl = AdaptiveKL(settings.kl_coefficient, settings.kl_target, horizon)
    return State(policy, values, optimiser, kl, LastGood(trained))


def draw_prompts(prompts: Sequence[Prompt], n: int, update: int, seed: int) -> list[Prompt]:
    """n prompts: the whole set is gone through before one comes again."""
    drawn = []
    for k in range(update * n, (update + 1) * n):
        lap, place = divmod(k, len(prompts))
        order = list(range(len(prompts)))
        random.Random(_number(seed, "lap", lap)).shuffle(order)
        drawn.append(prompts[order[place]])
    return drawn


def _number(*key: Any) -> int:
    return int(fingerprint("ppo", *key), 16) % (2**63)
