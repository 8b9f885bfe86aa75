"""Laws of the measures of sense: an answer belongs to its question, and a model that lost its sense is said to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solon.analysis.checks import of_sense
from solon.data import read_comparisons
from solon.engines import ScriptedEngine
from solon.errors import InputError
from solon.measures import sense
from solon.models.embedding import Embedder, embedder_directory
from solon.recipes.recipe import load_recipe
from solon.records import text_of, user
from solon.report.run import run_recipe

QUESTIONS = [
    "How do I cook rice?",
    "Why is the sky blue?",
    "What is a good name for a cat?",
    "How do I fix a flat tyre?",
]


class ByFirstLetter:
    """An embedder for laws: two texts are alike where they begin with the same letter."""

    def embed(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([torch.eye(26)[ord(t[0].lower()) - 97 if t else 0] for t in texts])


def test_the_share_of_other_questions_that_fit_less() -> None:
    questions, embedder = ["apple", "bread", "cream", "date"], ByFirstLetter()
    assert sense.about_their_questions(questions, ["a", "b", "c", "d"], embedder) == [1, 1, 1, 1]  # type: ignore[arg-type]
    # An answer about another question loses to that question alone; one about nothing is half: a coin's throw. Empty: nothing.
    assert sense.about_their_questions(questions, ["b", "b", "z", ""], embedder) == [1 / 3, 1, 0.5, 0]  # type: ignore[arg-type]


def test_the_same_question_asked_twice_does_not_compete_with_itself() -> None:
    twice = ["apple pie?", "Apple pie", "bread"]
    assert sense.about_their_questions(twice, ["a", "a", "b"], ByFirstLetter()) == [1, 1, 1]  # type: ignore[arg-type]
    assert sense.about_their_questions(["apple"], ["a"], ByFirstLetter()) == [None]  # type: ignore[arg-type]


def test_the_embedding_model_tells_an_answer_from_another_questions_answer() -> None:
    embedder, rows = Embedder.load("minilm"), read_comparisons("solon:comparisons-heldout")[:60]
    questions, answers = [sense.question_of(c.prompt) for c in rows], [text_of(c.chosen) for c in rows]
    own = sense.about_their_questions(questions, answers, embedder)
    shifted = sense.about_their_questions(questions, answers[1:] + answers[:1], embedder)
    assert np.mean(own) > 0.97 and 0.3 < np.mean(shifted) < 0.7  # type: ignore[arg-type]
    one = embedder.embed(["a", "b c d e f g h i"])
    assert torch.allclose(one[:1], embedder.embed(["a"]), atol=1e-5)  # the padding of a batch changes no vector
    assert torch.allclose(one.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_likelihood_is_per_word_and_leaves_out_what_has_none() -> None:
    engine = ScriptedEngine(prefer=lambda request: [-6.0 for _ in request.continuations])
    items = [("a", (user("q"),), "three words here"), ("b", (user("q"),), "one"), ("c", (user("q"),), "...")]
    assert sense.likelihoods(items, engine) == {"a": -2.0, "b": -6.0}


def test_an_embedder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        embedder_directory(str(tmp_path))


def measured(fall: float) -> dict[str, Any]:
    change = {"value": -fall, "low": -fall - 0.01, "high": -fall + 0.01, "n": 40}
    kl = {"value": 3.0, "low": 2.0, "high": 4.0, "n": 32}
    row = {"unit": "", "values": {}, "steps": {"start → RL-CAI": change}}
    return {
        "models": ["start", "RL-CAI"],
        "measures": [{"name": "about", **row}, {"name": "likely", **row}, {"name": "KL", "unit": "nats", "values": {"RL-CAI": kl}, "steps": {}}],
    }  # fmt: skip


@pytest.mark.parametrize(("fall", "outcome"), [(-0.1, "holds"), (0.05, "cannot be told"), (0.2, "does not hold")])
def test_a_fall_beyond_the_margin_does_not_hold(fall: float, outcome: str) -> None:
    about, likely, kl = of_sense(measured(fall), 0.05, 10.0, 25.0)
    assert about["outcome"] == outcome and likely["outcome"] == "holds" and kl["outcome"] == "holds"
    assert about["value"] == pytest.approx(fall) and about["low"] < about["high"]
    assert of_sense(measured(fall), 0.05, 10.0, 2.5)[2]["outcome"] == "cannot be told"


def small_run(path: Path, **overrides: Any) -> dict[str, Any]:
    more = {"human.n_demonstrations": 4, "human.n_comparisons": 10, "human.heldout_comparisons": 4, **overrides}
    return run_recipe(
        load_recipe("tiny", {"dtype": "float32", "gold.probes": 2, "ppo.updates": 1, **more}), path, quiet=True
    )


def test_the_gate_stops_a_run_whose_supervised_model_lost_its_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []

    def shares(questions: list[str], answers: list[str], embedder: Any) -> list[float | None]:
        answered.append(len(answers))
        jitter = np.linspace(0, 0.02, len(answers))
        return [float(x) for x in (0.97 + jitter if len(answered) % 2 else 0.6 + jitter[::-1])]

    monkeypatch.setattr(sense, "about_their_questions", shares)
    with pytest.raises(InputError, match="has lost its sense"):
        small_run(tmp_path / "r", **{"sense.gate": True})
    assert answered and not (tmp_path / "r" / "pairs").exists()
    # Started again, the run says the same without asking the models again.
    count = len(answered)
    with pytest.raises(InputError, match=r"sense\.gate=false"):
        small_run(tmp_path / "r", **{"sense.gate": True})
    assert len(answered) == count


def test_a_policy_that_lost_its_sense_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    falling = iter([0.95, 0.9, 0.3])

    def shares(questions: list[str], answers: list[str], embedder: Any) -> list[float | None]:
        level = next(falling)
        return [level + 0.01 * (i * i % 3) * (1 - level) for i in range(len(answers))]

    monkeypatch.setattr(sense, "about_their_questions", shares)
    data = small_run(tmp_path / "r", **{"prompts.n_heldout": 12})
    assert data["headline"].startswith("RL-CAI has lost its sense. ")
    assert any("has lost its sense: answers about their question" in w for w in data["warnings"])
    assert "answers about their question" in (tmp_path / "r" / "report.md").read_text()


def test_a_gate_needs_an_embedder() -> None:
    with pytest.raises(InputError, match=r"sense\.gate needs sense\.embedder"):
        load_recipe("tiny", {"sense.gate": True, "sense.embedder": None})
