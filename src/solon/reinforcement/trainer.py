"""The training loop of PPO: it applies the functions of `ppo.py` to models.

Policy, reference, reward model and value head share one trunk. The reference is the policy with its adapters switched off. A
reward model that was trained from the same weights is a second set of adapters. The reward may also be any other function of
conversations, such as a judge's rating.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
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
from solon.reinforcement.checkpoint import Snapshot, State, pack, restore, save
from solon.reinforcement.monitors import Check, Watch, text_measures
from solon.reinforcement.ppo import AdaptiveKL
from solon.reinforcement.reward import RewardFunction
from solon.reinforcement.reward_members import read_normalisation
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.rollout import Rollouts, sample
from solon.reinforcement.settings import PPOSettings
from solon.reinforcement.update import learn
from solon.training.finite import LastGood
from solon.training.loop import encode_all
from solon.training.saving import give_memory_back, save_merged
from solon.training.settings import Log, Progress


def ppo(
    prompts: Sequence[Prompt],
    model: str,
    reward: RewardFunction | str,
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
    """Train `model` to earn `reward` while it stays near itself. Yields one summary per update, then writes `out`.

    reward: a function, with a standard deviation of about 1 over conversations; or the directory of a reward model, which
    becomes adapters on the same trunk where it was trained from `model`. checkpoint: a directory that is written every
    `checkpoint_every` updates. Where it holds a checkpoint, training continues from there, on a CPU along the same path.
    watch: makes a check every `check_every` updates. Where its last check finds the reward gamed, the policy of its best
    check is written. log: gets each summary's numbers and the number of finished updates. more: further facts that decide
    the path of the training, such as the judge behind `reward`; a checkpoint with other facts is refused.
    Raises InputError where no prompt can be used or another training wrote the checkpoint; Diverged where the first loss is
    not finite.
    """
    trainer = Trainer(prompts, model, reward, settings, adapter, system, seed, dtype, watch, more or {})
    trainer.begin(checkpoint)
    unsaved: Snapshot | None = None
    try:
        while trainer.state.update < settings.updates and not trainer.over:
            summary = trainer.update()
            writes = checkpoint and distributed.is_main() and trainer.state.good.stopped is None
            unsaved = pack(trainer.state, trainer.watch, trainer.identity) if writes else None
            give_memory_back()
            if log:
                log(summary.numbers(), trainer.state.update)
            yield summary  # before the checkpoint: after a kill in between, the same update is made again
            due = trainer.state.update == settings.updates or trainer.over
            if checkpoint and unsaved and (due or trainer.state.update % settings.checkpoint_every == 0):
                save(checkpoint, unsaved)
                unsaved = None
            if progress:
                shown = {"reward": float(summary.reward or 0), "kl": trainer.state.kl_seen}
                progress(trainer.state.update, settings.updates, shown)
    except BaseException:  # Ctrl-C, or a judge that fails: the finished updates since the last checkpoint are saved
        if checkpoint and unsaved:
            save(checkpoint, unsaved)
        raise
    trainer.write(out)


class Trainer:
    """One training: the models and data that stay the same, and the steps of an update. The arguments are those of `ppo`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        model: str,
        reward: RewardFunction | str,
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
        on_policy: RewardModel | None = None
        if isinstance(reward, str):
            on_policy = RewardModel.load_on_policy(self.policy, self.tokenizer, reward, model)
            self.rewards = on_policy or RewardModel.load(reward, dtype)
            self.reward: RewardFunction = self.rewards.score
        else:
            self.reward = reward
        self.reads_beginnings = settings.value_start == "beginnings"
        if self.reads_beginnings and (on_policy is None or on_policy.system != system):
            raise InputError(
                "ppo.value_start: beginnings needs a reward model that was trained from this model with adapters and under the "
                "same system message; set it to zero"
            )
        if self.reads_beginnings and not read_normalisation(str(reward))["beginnings"]:
            raise InputError(
                f"ppo.value_start: beginnings, and {reward} has learned whole responses only; train it with beginnings above 0"
            )
        self.lower = lower_blocks(self.policy, self.tokenizer.pad_token_id)
        if self.rewards:
            self.rewards.share_lower_blocks(self.lower)
        self.state = start_state(self.policy, settings, self.rewards)
        self.identity = {
            "model": of_model(model),
            "reward": of_model(reward) if isinstance(reward, str) else "a function",
            "prompts": of_records(prompts),
            "adapter": adapter.model_dump(),
            "system": system,
            "seed": seed,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "settings": settings.deciding(),
            "probes": of_records(self.watch.probes) if self.watch else None,
            **more,
        }
        limit = context_limit(self.policy.config, self.tokenizer).less(settings.max_tokens, "the response")

        def encode(p: Prompt) -> tuple[Prompt, list[int]]:
            if self.rewards:
                room = self.rewards.limit.less(settings.max_tokens, "the response")
                self.rewards.ids((*p.prompt, assistant("")), room)
            return p, chat_ids(self.tokenizer, p.prompt, system=system, limit=limit)

        readable, self.left_out = encode_all("prompt", prompts, encode)
        self.prompts, self.contexts = [p for p, _ in readable], {p.id: ids for p, ids in readable}
        self._encode = encode

    def begin(self, checkpoint: Path | None) -> None:
        """Continue from the checkpoint. Without a check in it, the policy answers the probe prompts before it learns."""
        restore(checkpoint, self.state, self.watch, self.identity)
        if self.watch:
            answerable, _ = encode_all("probe prompt", self.watch.probes, self._encode)
            self.watch.probes, self.probes = [p for p, _ in answerable], [ids for _, ids in answerable]
            if not self.watch.checks:
                self.check()

    @property
    def over(self) -> bool:
        """Whether training ends early: a number was not finite, the KL is beyond its bound, or a check is bad."""
        if self.state.good.stopped is not None:
            return True
        bad = self.settings.stop_when_gamed and self.watch is not None and self.watch.checks[-1].bad
        return bad or not self.state.kl_seen <= self.settings.kl_bound

    def respond(self, contexts: list[list[int]], seed: int) -> tuple[list[Generated], list[str]]:
        """A response to each context, as tokens and as text."""
        completions = sample(
            self.policy, contexts, seed=seed, max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature, ends=end_ids(self.tokenizer), pad=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return completions, [answer_text(self.tokenizer, c.ids)[0] for c in completions]

    def score(self, chats: Sequence[Chat]) -> list[float]:
        """The reward of each conversation. Of several processes, each asks for its part."""
        scores = self.reward([chats[i] for i in distributed.local_indices(len(chats))])
        return distributed.all_gather([float(x) for x in scores], len(chats))

    def check(self) -> Check:
        """Let the policy answer the probe prompts. Its adapters are copied where the answers are the best so far."""
        assert self.watch is not None
        _, texts = self.respond(self.probes, _number(self.seed, "probes"))
        check = self.watch.check(self.state.update, texts, self.score)
        self._forget()
        if self.watch.best is check:
            learned = ((n, p) for n, p in self.policy.named_parameters() if p.requires_grad)
            self.state.best = {n: p.detach().clone() for n, p in learned}
        return check

    def update(self) -> RolloutSummary:
        """Sample responses, score them, and learn from them once."""
        state, settings, number = self.state, self.settings, self.state.update
        rates = (settings.learning_rate, settings.value_learning_rate)
        for group, rate in zip(state.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * settings.share_of_rate(number)
        distinct = draw_prompts(self.prompts, settings.rollouts // settings.responses_per_prompt, number, self.seed)
        drawn = [p for p in distinct for _ in range(settings.responses_per_prompt)]
        contexts = [self.contexts[p.id] for p in drawn]
        completions, texts = self.respond(contexts, _number(self.seed, number))
        responses = [c.ids + ([] if c.end is None else [c.end]) for c in completions]
        rollouts = Rollouts(contexts, responses, self.tokenizer.pad_token_id, self.policy.device, self.lower)
        chats = [(*p.prompt, assistant(t)) for p, t in zip(drawn, texts, strict=True)]
        if self.lower:  # the rows of rollouts and of a reward model on this trunk are computed together
            local = distributed.local_indices(len(chats))
            rows = [rollouts.rows[i] for i in local]
            if self.rewards and self.rewards.lower is not None and not self.reads_beginnings:
                rows += [self.rewards.ids(chats[i]) for i in local]
            self.lower.add(rows)
        beginnings = self._beginnings(rollouts) if self.reads_beginnings else None
        if beginnings is None:
            raw = torch.tensor(self.score(chats))
        else:  # a response that was cut earns what its beginning earns; `score` would read it as if it had ended
            end = rollouts.mask.sum(-1, keepdim=True).long().clamp(min=1) - 1
            raw = beginnings.gather(1, end).squeeze(1).cpu()
        ended = torch.tensor([c.ended for c in completions])
        summary = learn(state, rollouts, raw, ended, settings, random.Random(_number(self.seed, number)), beginnings)
        self._forget()
        state.update += 1
        state.kl_seen = float(summary.kl_nats or 0)
        last = state.update == settings.updates or self.over
        due = self.watch is not None and (last or state.update % settings.check_every == 0)
        check = self.check().summary() if due else None
        meta = {**summary.meta, "prompt_tokens": sum(map(len, contexts)), "left_out": self.left_out}
        return summary.model_copy(update={"watched": text_measures(texts), "check": check, "meta": meta})

    def _beginnings(self, rollouts: Rollouts) -> torch.Tensor:
        """The reward of each response up to and with each of its tokens, (rollouts, response)."""
        assert self.rewards is not None
        scores = torch.zeros_like(rollouts.mask)
        local = list(distributed.local_indices(len(rollouts.rows)))
        read = self.rewards.of_beginnings([rollouts.rows[i] for i in local], [rollouts.starts[i] for i in local])
        for i, values in zip(local, read, strict=True):
            scores[i, : len(values)] = torch.tensor(values, device=scores.device)
        distributed.all_reduce(scores)
        return scores

    def write(self, out: Path) -> None:
        """Write the policy, or the policy of the best check where the last check found the reward gamed or the sense lost."""
        if self.watch and self.watch.checks[-1].bad:
            with torch.no_grad():
                for name, parameter in self.policy.named_parameters():
                    if name in self.state.best:
                        parameter.copy_(self.state.best[name])
        save_merged(self.policy, self.tokenizer, out, base=resolve(self.model))

    def _forget(self) -> None:
        if self.lower:
            self.lower.forget()


def start_state(policy: Any, settings: PPOSettings, rewards: RewardModel | None) -> State:
    """The state before the first update. Raises InputError where the value head cannot start as `value_start` says."""
    values = torch.nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
    torch.nn.init.zeros_(values.weight)
    torch.nn.init.zeros_(values.bias)
    if settings.value_start == "reward-model":
        if rewards is None:
            raise InputError(
                "ppo.value_start: reward-model needs a reward model, and the reward here is none; set it to zero"
            )
        member = rewards.members[0]
        if member.head.weight.shape != values.weight.shape:
            raise InputError("ppo.value_start: reward model and policy have different widths; set it to zero")
        with torch.no_grad():
            values.weight.copy_(member.head.weight / member.std)
            values.bias.fill_(-member.mean / member.std)
    adapters = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": adapters, "lr": settings.learning_rate},
            {"params": values.parameters(), "lr": settings.value_learning_rate},
        ],
        weight_decay=0.0,
        eps=1e-5,  # Huang et al. 2024, detail 9
    )
    kl = AdaptiveKL(settings.kl_coefficient, settings.kl_target, horizon=8 * settings.rollouts)
    return State(policy, values, optimiser, kl, LastGood([*adapters, *values.parameters()]))


def draw_prompts(prompts: Sequence[Prompt], n: int, update: int, seed: int) -> list[Prompt]:
    """The n prompts of an update. Every prompt is drawn once before any prompt is drawn again.

    Each update has the same share of red-team and of helpful prompts, as far as n allows: with fewer of one kind by chance, an
    update would teach to decline more, or less.
    """
    sources: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        sources.setdefault(prompt.source, []).append(prompt)
    drawn, laps = [], {}
    for k in range(update * n, (update + 1) * n):
        lap, position = divmod(k, len(prompts))
        if lap not in laps:
            order = _number(seed, "lap", lap)
            laps[lap] = _evenly([random.Random(order).sample(rows, len(rows)) for rows in sources.values()])
        drawn.append(laps[lap][position])
    return drawn


def _evenly(lists: Sequence[list[Prompt]]) -> list[Prompt]:
    """The items of all lists, each list spread evenly over the whole."""
    placed = [((i + 0.5) / len(items), item) for items in lists for i, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def _number(*key: Any) -> int:
    """A seed that follows from the key."""
    return int(fingerprint("ppo", *key), 16) % (2**63)
