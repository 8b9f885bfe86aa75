"""`--dry-run`: what a recipe will do, before it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from solon.constitution import load_constitution
from solon.engines import is_remote
from solon.runs.data import Data
from solon.runs.ledger import cost, total_cost
from solon.runs.pipeline import reinforced_name
from solon.runs.recipe import Recipe
from solon.runs.run import model_of

WORDS_TO_TOKENS = 1.4  # English in today's vocabularies; an estimate needs no tokenizer


@dataclass(frozen=True)
class Questions:
    """What a stage asks one judge."""

    judge: str  # what --model takes
    sent: float  # tokens of all questions
    here: float  # of those, tokens that differ: what a model in this process computes
    written: float  # tokens of the answers


def estimate(recipe: Recipe) -> list[dict[str, Any]]:
    """One row a stage: records, tokens read, written and trained on, cost, and seconds on this machine.

    Seconds come from this machine's rate of matrix products and the model's size; where the size is not known
    (a server, a hub id that is not here), seconds are None. The cost is that of the judges behind endpoints, by genai-prices;
    None where the price of one is not known, which `unpriced` names. Good to about a factor of two.
    """
    return _Plan(recipe).stages()


class _Plan:
    """The rows of an estimate, stage by stage."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.data = recipe, Data(recipe)
        self.rules = load_constitution(recipe.constitution)
        rules = self.rules.principles
        self.prompt = _mean(sum(len(m.content.split()) for m in p.prompt) for p in self.data.prompts) + 20
        self.request = _mean(len((p.critique + p.revision).split()) * WORDS_TO_TOKENS / 2 for p in rules) + 8
        feedback = recipe.feedback
        self.judge = recipe.model if feedback.judge == "self" else feedback.judge
        self.of_pair = 1 if feedback.question else feedback.principles_per_pair or len(rules)
        self.asked = min(len(self.data.prompts), feedback.n_prompts or len(self.data.prompts))
        self.said = feedback.sampling.max_tokens * 0.75  # tokens of a response
        self.rows: list[dict[str, Any]] = []

    def stages(self) -> list[dict[str, Any]]:
        self.supervised()
        self.feedback()
        self.reward()
        self.reinforcement()
        self.evaluation()
        speed = _rates(self.recipe)
        for r in self.rows:
            here, elsewhere = r.pop("here"), r["endpoints"]
            computed = {**r, "prompt_tokens": here}
            known = speed and not elsewhere
            r["seconds"] = round(sum(computed[k] / speed[k] for k in speed)) if speed and known else None
        return self.rows

    def row(
        self, name: str, records: int, read: float = 0, written: float = 0, trained: float = 0,
        questions: Sequence[Questions] = (),
    ) -> None:  # fmt: skip
        """read, written, trained: tokens, without those of the questions."""
        priced = {model_of(q.judge): _price(q) for q in questions if is_remote(q.judge) and q.sent}
        unpriced = sorted(name for name, usd in priced.items() if usd is None)
        self.rows.append(
            {
                "name": name,
                "records": records,
                "prompt_tokens": round(read + sum(q.sent for q in questions)),
                "completion_tokens": round(written + sum(q.written for q in questions)),
                "trained_tokens": round(trained),
                "here": round(read + sum(q.here for q in questions)),
                "endpoints": sorted(priced),
                "unpriced": unpriced,
                "cost_usd": None if unpriced else round(sum(usd or 0.0 for usd in priced.values()), 6),
            }
        )

    def compared(self, judge: str, pairs: int, said: float, principles: int) -> Questions:
        """A judge that compares in both orders. said: tokens of a response."""
        how = self.recipe.feedback
        if how.together:
            principles = 1
        shown = how.few_shot * (self.prompt + 2 * said + 50)
        each = self.prompt + 2 * said + 50 + shown
        asked = pairs * principles * 2
        here = pairs * (self.prompt + shown + 2 * (2 * said + principles * 50))
        if not how.rationales:
            return Questions(
                judge, asked * each, here, asked * is_remote(judge)
            )  # here a letter is read off, not written
        thought = how.rationale_sampling.max_tokens * 0.75  # written once, and read again with the question
        asked *= how.rationales
        return Questions(
            judge, asked * (2 * each + thought), here + asked * thought, asked * (thought + is_remote(judge))
        )

    def rated(self, responses: int, said: float) -> Questions:
        principles = self.of_pair
        sent = responses * principles * (self.prompt + said + 50)
        here = responses * (self.prompt + said + principles * 50)
        return Questions(self.judge, sent, here, responses * principles * is_remote(self.judge))

    def supervised(self) -> None:
        recipe, data, prompt, n = self.recipe, self.data, self.prompt, len(self.data.prompts)
        if recipe.warmup:
            answers = sum(sum(len(m.content.split()) for m in d.messages) + 20 for d in data.demonstrations)
            chains = sum(
                (len(c.response.split()) + sum(len((s.critique + s.revision).split()) for s in c.steps)) * WORDS_TO_TOKENS
                + prompt + 2 * self.request
                for c in data.revision_demonstrations
            )  # fmt: skip
            count = len(data.demonstrations) + len(data.revision_demonstrations)
            self.row("warmup", count, trained=recipe.warmup.train.epochs * (answers * WORDS_TO_TOKENS + chains))
        if recipe.feedback.warmup and recipe.feedback.labels != "human":
            m = 2 * len(data.comparisons)
            self.row("feedback-model", m, trained=recipe.feedback.warmup.epochs * m * (prompt + 130))
        if not (part := recipe.supervised):
            return
        said = part.sampling.max_tokens * 0.75
        turns = 1 + part.revisions * (2 if part.critique else 1)
        step = prompt + said + self.request + (prompt + 2 * said + 2 * self.request)
        self.row("revisions", n, n * (prompt + part.revisions * step), n * turns * said)
        if part.sft_on == "best":
            self.row("choices", n, questions=[self.compared(self.judge, n, said, 1)])
        kept = n * (part.revisions if part.sft_on == "all" else 1) / (1 - part.demonstration_share)
        self.row("sl-cai", round(kept), trained=part.train.epochs * kept * (prompt + said))

    def feedback(self) -> None:
        if self.recipe.feedback.labels == "human":
            return
        known, asked = len(self.data.heldout_comparisons), self.asked
        self.row("judge-heldout", known, questions=[self.compared(self.judge, known, self.said, 1)])
        self.row("pairs", asked, 2 * asked * self.prompt, 2 * asked * self.said)
        if not self.recipe.feedback.direct:
            self.row("comparisons", asked, questions=[self.compared(self.judge, asked, self.said, self.of_pair)])

    @property
    def labelled(self) -> int:
        labels = self.recipe.feedback.labels
        return (self.asked if labels != "human" else 0) + (len(self.data.comparisons) if labels != "ai" else 0)

    def reward(self) -> None:
        if self.recipe.feedback.direct:
            references = min(128, 2 * self.asked)
            self.row("judge-reward", references, questions=[self.rated(references, self.said)])
            return
        learner, labelled = self.recipe.reward_model.train, self.labelled
        trained = learner.members * learner.epochs * labelled * 2 * (self.prompt + self.said)
        self.row("reward-model", labelled, trained=trained)

    def reinforcement(self) -> None:
        recipe, ppo, prompt, held = self.recipe, self.recipe.ppo, self.prompt, len(self.data.heldout)
        answer = ppo.max_tokens * 0.75
        if recipe.algorithm == "dpo":
            trained = ppo.epochs * self.labelled * 2 * (prompt + self.said)
            self.row("dpo", self.labelled, trained=trained)
        else:
            rollouts = ppo.updates * ppo.rollouts
            checks = math.ceil(ppo.updates / ppo.check_every) if ppo.check_every else 0
            probes = (checks + bool(checks)) * recipe.gold.probes  # update 0 answers too, and is compared with nothing
            gold = recipe.gold.judge or (self.judge if recipe.feedback.labels != "human" else None)
            questions = [self.compared(gold, checks * recipe.gold.probes, answer, self.of_pair)] if gold else []
            if recipe.feedback.direct:
                questions.append(self.rated(rollouts + probes, answer))
            self.row(
                recipe.algorithm,
                ppo.updates,
                (rollouts + probes) * prompt,
                (rollouts + probes) * answer,
                ppo.epochs * rollouts * (prompt + answer),
                questions,
            )
        self.row("kl", held, 3 * held * prompt + 2 * held * answer, held * answer)  # sampled once, read by two models

    def evaluation(self) -> None:
        recipe, held = self.recipe, len(self.data.heldout)
        models, answer = 2 + bool(recipe.warmup or recipe.supervised), recipe.evaluation.sampling.max_tokens * 0.75
        answers = models * held
        rated = [self.rated(answers, answer)] if recipe.feedback.direct else []
        self.row("evaluation", answers, answers * self.prompt, answers * answer, questions=rated)
        each = min(held, recipe.evaluation.judge_comparisons)
        if recipe.feedback.labels != "human" and each:
            pairs = (models - 1) * each
            self.row("judging", pairs, questions=[self.compared(self.judge, pairs, answer, self.of_pair)])


def _price(questions: Questions) -> float | None:
    from solon.engines.endpoint import parse_spec, price_usd

    kind = questions.judge.partition(":")[0]
    model, url = parse_spec(questions.judge, kind)
    return price_usd(model, url, round(questions.sent), round(questions.written))


def estimate_table(recipe: Recipe, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=Text(f"{recipe.name}: what would run ({reinforced_name(recipe)})"))
    for name in ("stage", "records", "tokens read", "written", "trained on", "time", "cost"):
        table.add_column(
            name,
            justify="left" if name in ("stage", "cost") else "right",
            no_wrap=name == "stage",
            min_width=9 if name == "cost" else None,
        )
    for r in rows:
        seconds = "unknown" if r["seconds"] is None else _clock(r["seconds"])
        tokens = (f"{r[k]:,}" for k in ("prompt_tokens", "completion_tokens", "trained_tokens"))
        table.add_row(
            r["name"], f"{r['records']:,}", *tokens, seconds, Text(cost(r) if r["endpoints"] else "runs here")
        )
    known = [r["seconds"] for r in rows if r["seconds"] is not None]
    unpriced = sorted({name for r in rows for name in r["unpriced"]})
    whole = total_cost(rows)
    if whole is None:
        spent = f"not known: there is no price for {', '.join(unpriced)}; multiply the tokens above by your own"
    elif any(r["endpoints"] for r in rows):
        spent = f"about ${whole:.2f} (±2×, by genai-prices)"
    else:
        spent = "none, all models run here"
    table.caption = Text(f"about {_clock(sum(known))} here (±2×); cost: {spent}")
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _mean(values: Any) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found) if found else 0.0


def _rates(recipe: Recipe) -> dict[str, float] | None:
    """Tokens a second read, written and trained on, from the model's size and a measured matrix product."""
    import torch

    from solon.errors import InputError
    from solon.models.weights import resolve, resolve_dtype

    if is_remote(recipe.model):
        return None
    parameters = 3e4
    if recipe.model != "tiny-random":
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(resolve(recipe.model), local_files_only=True).get_text_config()
        except (InputError, OSError):
            return None
        layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        parameters = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    a = torch.ones(768, 768, dtype=resolve_dtype(recipe.dtype))
    a @ a
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    flops = 10 * 2 * 768**3 / (time.perf_counter() - began)
    forward = 0.6 * flops / (2 * parameters)  # 60 % of the peak is what the stages were seen to reach
    return {"prompt_tokens": forward, "completion_tokens": 0.35 * forward, "trained_tokens": 0.4 * forward}
