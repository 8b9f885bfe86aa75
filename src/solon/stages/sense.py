"""Sense: whether the trained models still make sense, measured against the start model by measures that nothing was trained on.

The stage `sense` measures every model's answers to the held-out prompts. The stage `sense-gate` measures the supervised model on
training prompts and stops the run where the model has lost its sense, before the reinforcement stage spends hours on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from solon.engines import GenerationRequest
from solon.errors import InputError
from solon.records import Prompt
from solon.runs import Artifact
from solon.runs.common import Common
from solon.settings import Settings
from solon.stages.artifacts import BASE_MODEL, DATA, SENSE_KEPT, START_MODEL
from solon.stages.base import Stage
from solon.stages.evaluation import ANSWERS, EvaluationSettings, models_of
from solon.stages.kl import algorithm_of
from solon.stages.plan import FILLED, Plan
from solon.tables import Section, estimate, text
from solon.training.settings import Progress

if TYPE_CHECKING:
    from solon.analysis.measures import Answer
    from solon.measures.statistics import Estimate
    from solon.runs.run import Run

SENSE = Artifact[dict[str, Any]]("sense")
ABOUT, LIKELY, KL = "answers about their question", "likely under the start model", "KL to the start model"
UNITS = {ABOUT: "", LIKELY: "nats per word", KL: "nats per response"}
LOST = "lost its sense"


class SenseSettings(Settings):
    """Measures of whether the answers still make sense, and how much of it a run may lose."""

    embedder: str | None = "minilm"
    """The embedding model that compares answers with questions: minilm, a directory or a hub id; null: not measured."""
    margin: float = Field(0.02, gt=0, lt=0.5)
    """How far "answers about their question" (0..1) may fall from the start model to the last one."""
    likelihood_margin: float = Field(1.0, gt=0)
    """How far the log-probability of the answers under the start model may fall, in nats per word."""
    kl_bound: float = Field(40.0, gt=0)
    """How far a model may move from the start model on helpful held-out prompts, in nats per response."""
    kl_prompts: int = Field(32, ge=0)
    """Number of helpful held-out prompts on which the KL to the start model is measured; 0: it is not measured."""
    gate: bool = False
    """Stop the run after the supervised stage where the supervised model's answers have lost their sense."""
    gate_prompts: int = Field(32, ge=8)
    """Number of helpful training prompts that the gate measures."""


class SenseGate(Stage):
    name = "sense-gate"
    needs, uses, makes = (DATA, START_MODEL), BASE_MODEL, (SENSE_KEPT,)

    def runs(self, recipe: Common) -> bool:
        return recipe.of(SenseSettings).gate

    def check(self, recipe: Common) -> None:
        settings = recipe.of(SenseSettings)
        if settings.gate and settings.embedder is None:
            raise ValueError("sense.gate needs sense.embedder; name one, or set the gate to false")
        if settings.gate and recipe.prompts.n_helpful == 0:
            raise ValueError("sense.gate measures helpful training prompts, and prompts.n_helpful is 0")

    def estimate(self, plan: Plan) -> None:
        n = 2 * plan.recipe.of(SenseSettings).gate_prompts
        plan.add(
            self.name,
            n,
            read=n * plan.prompt,
            written=n * plan.recipe.of(EvaluationSettings).sampling.max_tokens * FILLED,
        )

    def run(self, run: Run) -> None:
        from solon.analysis.checks import check
        from solon.engines.identity import of_model
        from solon.measures.sense import about_their_questions, question_of
        from solon.measures.statistics import FAILS, difference
        from solon.models.embedding import Embedder

        settings, base, start = run.recipe.of(SenseSettings), run.get(*BASE_MODEL), run.get(START_MODEL)
        helpful = [p for p in run.get(DATA).prompts if p.source == "helpful"][: settings.gate_prompts]
        embedder = settings.embedder
        assert embedder is not None

        def work(step: Progress) -> dict[str, Any]:
            loaded = Embedder.load(embedder)
            shares = []
            for n, spec in enumerate((start, base), start=1):
                answers = self._answer(run, spec, helpful)
                shares.append(about_their_questions([question_of(p.prompt) for p in helpful], answers, loaded))
                step(n, 2, {})
            both = [(new, old) for old, new in zip(*shares, strict=True) if new is not None and old is not None]
            fall = difference([old for _, old in both], [new for new, _ in both])
            return {"examples": len(both), "fall": fall.to_json()}

        if base == start or not helpful:
            run.put(SENSE_KEPT, True)
            return
        made_from = {"start": of_model(start), "model": of_model(base), "embedder": embedder_identity(embedder)}
        fall = run.once(self.name, work, total=2, noun="models", made_from=made_from)["fall"]
        row = check(ABOUT, "below", settings.margin, "", fall, fails="", unknown="")
        if row["outcome"] == FAILS:
            raise InputError(
                f"{self.name}: the supervised model has {LOST}: its answers are less about their question than the start model's, "
                f"by {estimate(fall)}, and {settings.margin:g} is allowed (sense.margin); train it for fewer epochs, at a lower "
                "learning rate or on better examples; or to go on as it is, write gate: false into "
                f"{run.dir / 'recipe.yaml'} and add --set sense.gate=false"
            )
        if row["holds"] is None:
            run.say(
                f"{self.name}: whether the supervised model keeps its sense cannot be told ({estimate(fall)}); the run goes on"
            )
        run.put(SENSE_KEPT, True)

    def _answer(self, run: Run, spec: str, prompts: Sequence[Prompt]) -> list[str]:
        sampling, seed = run.recipe.of(EvaluationSettings).sampling.sampling(), run.recipe.seed
        with run.engine(spec) as engine:
            requests = [GenerationRequest(p.id, p.prompt, seed) for p in prompts]
            texts = {c.id: c.text for c in engine.generate(requests, sampling)}
        return [texts[p.id] for p in prompts]


class Sense(Stage):
    name = "sense"
    part, settings = "sense", SenseSettings
    needs, uses, makes = (DATA, START_MODEL, ANSWERS), BASE_MODEL, (SENSE,)

    def describe(self, recipe: Common) -> Iterable[str]:
        from solon.models.embedding import embedder_directory

        settings = recipe.of(SenseSettings)
        if settings.embedder is None:
            return
        try:
            embedder_directory(settings.embedder)
        except InputError as error:
            if settings.gate:
                raise
            yield f'sense: "{ABOUT}" will not be measured: {error}'

    def estimate(self, plan: Plan) -> None:
        response = plan.recipe.of(EvaluationSettings).sampling.max_tokens * FILLED
        n = 3 * len(plan.data.heldout)
        plan.add(self.name, n, read=n * (plan.prompt + response))

    def run(self, run: Run) -> None:
        from solon.engines.identity import of_model
        from solon.identity import of_records

        answers, models = run.get(ANSWERS), models_of(run)

        def work(step: Progress) -> dict[str, Any]:
            return {
                "examples": sum(map(len, answers.values())),
                ABOUT: self._about(run),
                LIKELY: self._likely(run),
                KL: self._kl(run, models),
            }

        made_from = {name: of_model(spec) for name, spec in models.items()}
        made_from["embedder"] = embedder_identity(run.recipe.of(SenseSettings).embedder)
        made_from |= {f"answers of {name}": of_records(given) for name, given in answers.items()}
        run.put(SENSE, run.once(self.name, work, noun="measures", made_from=made_from))

    def _about(self, run: Run) -> dict[str, dict[str, float]]:
        """By model and prompt, how much the answer is about its question."""
        from solon.measures.sense import about_their_questions, question_of
        from solon.models.embedding import Embedder

        spec = run.recipe.of(SenseSettings).embedder
        if spec is None:
            return {}
        try:
            embedder = Embedder.load(spec)
        except InputError:  # told at the start of the run
            return {}
        shares = {}
        for name, given in helpful_answers(run).items():
            values = about_their_questions([question_of(a.prompt) for a in given], [a.answer for a in given], embedder)
            shares[name] = {a.id: v for a, v in zip(given, values, strict=True) if v is not None}
        return shares

    def _likely(self, run: Run) -> dict[str, dict[str, float]]:
        """By model and prompt, the log-probability of the answer under the start model in nats per word."""
        from solon.measures.sense import likelihoods

        with run.engine(run.get(START_MODEL)) as engine:
            return {
                name: likelihoods([(a.id, a.prompt, a.answer) for a in given], engine)
                for name, given in helpful_answers(run).items()
            }

    def _kl(self, run: Run, models: dict[str, str]) -> dict[str, Any]:
        """By model, the KL to the start model on helpful held-out prompts."""
        from solon.analysis.kl import kl_of_written

        recipe, start = run.recipe, run.get(START_MODEL)
        helpful = [p for p in run.get(DATA).heldout if p.source == "helpful"][: recipe.of(SenseSettings).kl_prompts]
        temperature, max_tokens = algorithm_of(recipe).sampling(recipe)
        return {
            name: kl_of_written(
                spec, start, helpful, system=recipe.system, temperature=temperature, max_tokens=max_tokens,
                seed=recipe.seed, dtype=recipe.dtype,
            )["kl_nats"]
            for name, spec in models.items()
            if spec != start and helpful
        }  # fmt: skip

    def gather(self, run: Run) -> dict[str, Any]:
        measured, names = run.get(SENSE), list(run.get(ANSWERS))
        steps = [*pairwise(names), *([(names[0], names[-1])] if len(names) > 2 else [])]
        rows = []
        for measure in (ABOUT, LIKELY):
            by_model: dict[str, dict[str, float]] = measured[measure]
            rows.append(
                {
                    "name": measure,
                    "unit": UNITS[measure],
                    "values": {name: _mean(by_model[name]).to_json() for name in by_model},
                    "steps": {
                        f"{a} → {b}": _change(by_model[a], by_model[b]).to_json()
                        for a, b in steps
                        if a in by_model and b in by_model
                    },
                }
            )
        rows.append({"name": KL, "unit": UNITS[KL], "values": measured[KL], "steps": {}})
        sense = {"measures": rows, "models": names}
        return {"sense": {**sense, "lost": [c["name"] for c in self._checks(run, sense) if c["holds"] is False]}}

    def warnings(self, run: Run) -> list[str]:
        sense = self.gather(run)["sense"]
        if not sense["lost"]:
            return []
        return [
            f"{sense['models'][-1]} has {LOST}: {'; '.join(sense['lost'])} more than the recipe allows. Do not use it."
        ]

    def checks(self, run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
        return self._checks(run, data["sense"])

    def _checks(self, run: Run, sense: dict[str, Any]) -> list[dict[str, Any]]:
        from solon.analysis.checks import of_sense

        settings = run.recipe.of(SenseSettings)
        return of_sense(sense, settings.margin, settings.likelihood_margin, settings.kl_bound)

    def sections(self, data: dict[str, Any]) -> list[Section]:
        sense = data.get("sense") or {}
        names = [str(n) for n in sense.get("models") or []]
        steps = list(dict.fromkeys(step for row in sense.get("measures") or [] for step in row.get("steps") or {}))
        rows = tuple(
            (
                text(row.get("name")),
                text(row.get("unit")) or "–",
                *(estimate((row.get("values") or {}).get(n), row.get("unit") or "") for n in names),
                *(estimate((row.get("steps") or {}).get(s), row.get("unit") or "", sign=True) for s in steps),
            )
            for row in sense.get("measures") or []
        )
        note = (
            "Answers to helpful prompts; no training pushed on these. An answer is about its question where an embedding model finds it more like its own question "
            "than like the other held-out questions: 1 is best, 0.5 is chance. KL is measured on helpful prompts."
        )
        return [Section("Sense", note, ("measure", "unit", *names, *steps), rows)]


def helpful_answers(run: Run) -> dict[str, list[Answer]]:
    """Each model's answers to helpful prompts. A refusal of a harmful prompt need not say what the prompt was about."""
    return {name: [a for a in given if a.source == "helpful"] for name, given in run.get(ANSWERS).items()}


def embedder_identity(spec: str | None) -> dict[str, str]:
    """The embedding model, and whether it is on this machine: where it comes later, the stage is made again."""
    from solon.models.embedding import embedder_directory
    from solon.publishing.content import weights_fingerprint

    if spec is None:
        return {"name": "none", "fingerprint": "none"}
    try:
        return {"name": spec, "fingerprint": weights_fingerprint(Path(embedder_directory(spec)))}
    except InputError:
        return {"name": spec, "fingerprint": "not here"}


def _mean(values: dict[str, float]) -> Estimate:
    from solon.measures.statistics import mean

    return mean(list(values.values()))


def _change(old: dict[str, float], new: dict[str, float]) -> Estimate:
    from solon.measures.statistics import difference

    common = [i for i in new if i in old]
    return difference([new[i] for i in common], [old[i] for i in common])
