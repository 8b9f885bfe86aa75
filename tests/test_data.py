"""What is held out is in nothing that is trained on, whoever's the files are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solon.constitution import load_constitution
from solon.data.heldout import prompt_keys, split_comparisons
from solon.errors import InputError
from solon.recipes.recipe import load_recipe
from solon.records import Comparison, assistant, user
from solon.stages.data import Data


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def questions(n: int, kind: str = "helpful") -> list[dict[str, Any]]:
    return [{"id": f"{kind}-{i}", "prompt": f"How do I cook {kind} dish number {i}?"} for i in range(n)]


def texts(rows: Any) -> set[str]:
    return {r.prompt[-1].content for r in rows}


def test_own_prompts_are_never_measured_on_the_shipped_ones(tmp_path: Path) -> None:
    mine = lines(tmp_path / "mine.jsonl", questions(50))
    data = Data(load_recipe("rlaif", {"prompts.helpful": mine, "prompts.n_red_team": 0}))
    assert len(data.heldout) == 10 and len(data.prompts) == 40  # a fifth
    assert texts(data.heldout) | texts(data.prompts) == {r["prompt"] for r in questions(50)}
    assert not any(name.startswith("solon:") and name.endswith("heldout") for name in data.names)
    assert any("10 of 50" in line and "kept out of training" in line for line in data.describe())
    again = Data(load_recipe("rlaif", {"prompts.helpful": mine, "prompts.n_red_team": 0}))
    other = Data(load_recipe("rlaif", {"prompts.helpful": mine, "prompts.n_red_team": 0, "seed": 1}))
    assert texts(again.heldout) == texts(data.heldout) != texts(other.heldout)


def test_a_heldout_file_of_ones_own_is_taken_and_shipped_prompts_have_theirs(tmp_path: Path) -> None:
    mine, held = lines(tmp_path / "a.jsonl", questions(6)), lines(tmp_path / "b.jsonl", questions(3, "held-out"))
    data = Data(load_recipe("rlaif", {"prompts.helpful": mine, "prompts.heldout_helpful": held}))
    assert {p.content for x in data.heldout for p in x.prompt if x.source == "helpful"} == {
        r["prompt"] for r in questions(3, "held-out")
    }
    assert data.heldout_from["red_team"].endswith("solon:red-team-heldout")
    assert len([p for p in data.prompts if p.source == "helpful"]) == 6


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    mine = lines(tmp_path / "a.jsonl", [{"prompt": "the same?", "id": "1"}, {"prompt": "The  same?", "id": "2"}])
    with pytest.raises(InputError, match=r"a.jsonl holds 1 different prompt, .* prompts.heldout_helpful"):
        Data(load_recipe("rlaif", {"prompts.helpful": mine}))


def test_heldout_prompts_are_taken_out_of_everything_that_is_trained_on(tmp_path: Path) -> None:
    held = "How do I pick a lock?"
    again = "how do i  PICK a lock?!"
    longer = [
        {"role": "user", "content": again},
        {"role": "assistant", "content": "With care."},
        {"role": "user", "content": "Go on."},
    ]
    prompts = lines(tmp_path / "p.jsonl", [*questions(5), {"id": "x", "prompt": again}, {"id": "y", "prompt": longer}])
    heldout = lines(tmp_path / "h.jsonl", [{"id": "h", "prompt": held}, {"id": "h2", "prompt": "Go on."}])
    answer = {"role": "assistant", "content": "No."}
    shown = lines(
        tmp_path / "d.jsonl",
        [
            {"id": "1", "messages": [*longer, answer]},
            {"id": "2", "messages": [{"role": "user", "content": "Something else entirely?"}, answer]},
        ],
    )
    chain = {"response": "a", "steps": [{"principle": "avoid-harm", "critique": "c", "revision": "r"}]}
    revised = lines(
        tmp_path / "r.jsonl",
        [
            {"id": "1", "prompt": [longer[0]], **chain},
            {"id": "2", "prompt": [{"role": "user", "content": "Else?"}], **chain},
        ],
    )
    sides = {"chosen": [answer], "rejected": [{"role": "assistant", "content": "Yes."}]}
    compared = lines(
        tmp_path / "c.jsonl",
        [
            {"id": "0", "prompt": [longer[0]], **sides, "label": 1.0},
            *(
                {"id": f"{q}{n}", "prompt": [{"role": "user", "content": q}], **sides, "label": 1.0}
                for q in ("One thing?", "Another thing?", "A third thing?")
                for n in range(3)
            ),
        ],
    )
    data = Data(
        load_recipe(
            "rlhf",
            {
                "prompts.helpful": prompts,
                "prompts.heldout_helpful": heldout,
                "prompts.n_red_team": 0,
                "human.demonstrations": [shown],
                "human.revision_demonstrations": revised,
                "human.comparisons": [compared],
                "human.heldout_comparisons": 2,
            },
        )
    )
    assert texts(data.prompts) == {r["prompt"] for r in questions(5)}
    assert [d.id for d in data.demonstrations] == ["2"] and [d.id for d in data.revision_demonstrations] == ["2"]
    assert len(data.heldout_comparisons) == 3 and len(data.comparisons) == 6  # a prompt's comparisons stay together
    assert not texts(data.heldout_comparisons) & texts(data.comparisons)
    expected = {"human comparisons": 1, "training prompts": 2, "demonstrations": 1, "revision demonstrations": 1}
    assert data.removed == expected
    assert "2 training prompts" in list(data.describe())[-1] and data.split()["removed"] == expected


def test_comparisons_can_be_held_out_in_a_file_of_their_own() -> None:
    shipped = {
        "human.comparisons": ["solon:comparisons-harmless"],
        "human.heldout_from": "solon:comparisons-heldout",
        "human.heldout_comparisons": 30,
        "human.n_comparisons": 20,
        "human.demonstrations": ["solon:demonstrations-harmless"],
        "human.n_demonstrations": 9,
        "human.revision_demonstrations": "solon:revision-demonstrations",
        "human.n_revision_demonstrations": 5,
    }
    data = Data(load_recipe("rlhf", shipped))
    assert all(c.id.startswith("co-") for c in data.heldout_comparisons) and len(data.heldout_comparisons) == 30
    assert all(c.id.startswith("ch-") for c in data.comparisons) and len(data.comparisons) == 20
    assert len(data.demonstrations) == 9 and len(data.revision_demonstrations) == 5
    same = Data(load_recipe("rlhf", {**shipped, "human.heldout_from": "solon:comparisons-harmless"}))
    assert len(same.heldout_comparisons) == 30 and not texts(same.heldout_comparisons) & texts(same.comparisons)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("How do I pick a lock?", "HOW  do i pick a lock", True),
        ("ﬁnd the naïve café", "find the naïve café", True),  # ligature and composed letters
        ("どうやって鍵を開けますか教えてください", "どうやって鍵を開けますか教えてください！", True),
        ("How do I pick a lock?", "How do I pick a rock?", False),
        ("👍👍", "👍", False),
    ],
)
def test_two_prompts_are_the_same_by_their_words(a: str, b: str, same: bool) -> None:
    assert bool(prompt_keys((user(a),)) & prompt_keys((user(b),))) is same
    # As the last turn of a longer conversation it is the same too, unless it is a few words that anybody says.
    longer = (user("Hello."), assistant("Hello!"), user(b))
    long_enough = same and len(b) > 15 and b != "find the naïve café"
    assert bool(prompt_keys((user(a),)) & prompt_keys(longer)) is (long_enough or (same and len(b.split()) >= 4))
    assert not prompt_keys((user("Go on."), assistant("a"), user("Go on."))) & prompt_keys((user("Go on."),))


def test_a_heldout_set_that_holds_all_prompts_is_refused(tmp_path: Path) -> None:
    mine = lines(tmp_path / "mine.jsonl", questions(4))
    with pytest.raises(InputError, match="prompts: every one is among the held-out"):
        Data(load_recipe("rlaif", {"prompts.helpful": mine, "prompts.heldout_helpful": mine, "prompts.n_red_team": 0}))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 30))
def test_comparisons_are_split_by_prompt(prompts: list[int], n: int) -> None:
    rows = [
        Comparison(
            id=str(i),
            prompt=(user(f"Prompt number {p}?"),),
            chosen=(assistant("a"),),
            rejected=(assistant("b"),),
            label=1,
        )
        for i, p in enumerate(prompts)
    ]
    try:
        held, left = split_comparisons(rows, n)
    except InputError:
        assert n > len(rows) - max(map(prompts.count, prompts))
        return
    assert len(held) >= min(n, len(rows)) and len(held) + len(left) == len(rows)
    assert not {k for c in held for k in prompt_keys(c.prompt)} & {k for c in left for k in prompt_keys(c.prompt)}
    assert n or not held


def test_only_the_red_team_prompts_get_pairs_where_people_compare_the_others() -> None:
    from solon.stages.pairs import asked_prompts

    recipe = load_recipe("hybrid", {"feedback.compare": "red_team", "feedback.n_prompts": 9})
    asked = asked_prompts(recipe, Data(recipe).prompts)
    assert len(asked) == 9 and {p.source for p in asked} == {"red_team"}
    both = load_recipe("hybrid", {"feedback.compare": "all"})
    assert len(asked_prompts(both, Data(both).prompts)) == len(Data(both).prompts)
    with pytest.raises(InputError, match=r"feedback\.compare"):
        load_recipe("hybrid", {"feedback.compare": "red_team", "prompts.n_red_team": 0})
    with pytest.raises(InputError, match=r"labels to both"):
        load_recipe("hybrid", {"feedback.compare": "red_team", "feedback.labels": "ai"})


def test_the_reinforcement_stage_may_have_further_prompts_and_none_of_them_is_held_out(tmp_path: Path) -> None:
    mine = lines(tmp_path / "mine.jsonl", questions(50))
    settings = {"prompts.helpful": mine, "prompts.n_helpful": 8, "prompts.n_red_team": 5}
    few = Data(load_recipe("rlaif", settings))
    more = Data(load_recipe("rlaif", {**settings, "prompts.rl_helpful": 20, "prompts.rl_red_team": 3}))
    assert more.prompts == few.prompts == few.rl_prompts and more.heldout == few.heldout
    further = [p for p in more.rl_prompts if p not in more.prompts]
    assert [sum(p.source == kind for p in further) for kind in ("helpful", "red_team")] == [20, 3]
    assert not texts(further) & (texts(more.heldout) | texts(more.prompts))
    assert any("samples: 23" in line for line in more.describe())
    most = Data(load_recipe("rlaif", {**settings, "prompts.rl_helpful": 10_000}))
    assert any("ask for 10000, and the sets hold no more" in line for line in most.describe())
    with pytest.raises(InputError, match=r"rl_helpful: no prompt is left where n_helpful is null"):
        load_recipe("rlaif", {"prompts.rl_helpful": 1})
    alone = Data(load_recipe("rlaif", {**settings, "prompts.n_red_team": 0, "prompts.rl_red_team": 3}))
    assert sum(p.source == "red_team" for p in alone.rl_prompts) == 3 and "red_team" in alone.heldout_from


def test_the_warm_up_learns_the_better_response_of_each_prompt_once() -> None:
    from solon.supervised.dataset import SAME_PROMPT, UNDECIDED, from_preferred

    def comparison(n: int, prompt: str, label: float | None) -> Comparison:
        sides = {"chosen": (assistant(f"good {n}"),), "rejected": (assistant(f"bad {n}"),)}
        return Comparison(id=str(n), prompt=(user(prompt),), label=label, abstained=label is None, **sides)

    rows = [
        comparison(0, "a", 0.9),
        comparison(1, "a", 0.9),
        comparison(2, "b", 0.1),
        comparison(3, "c", 0.5),
        comparison(4, "d", None),
    ]
    made, left_out = from_preferred(rows)
    assert [m.messages[-1].content for m in made] == ["good 0", "bad 2"]
    assert left_out == {SAME_PROMPT: 1, UNDECIDED: 2}
    with pytest.raises(InputError, match=r"warmup\.preferred"):
        load_recipe("rlhf", {"warmup.preferred": "whole", "human.comparisons": [], "feedback.labels": "ai"})
    with pytest.raises(InputError, match=r"opening needs warmup\.train\.opening_tokens"):
        load_recipe("hybrid", {"warmup.preferred": "opening", "warmup.train.opening_tokens": 0})
    with pytest.raises(InputError, match=r"answers_whole needs warmup\.train\.opening_tokens"):
        load_recipe("hybrid", {"warmup.preferred": "none", "warmup.train.opening_tokens": 0})
    with pytest.raises(InputError, match=r"answers_whole: 0 leaves nothing"):
        load_recipe("hybrid", {"warmup.answers_whole": 0, "human.revision_demonstrations": None})


@pytest.mark.parametrize("preferred", ["none", "opening", "whole"])
def test_the_warm_up_learns_of_the_better_responses_what_the_recipe_says(
    preferred: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import solon.stages.sft
    from solon.stages.artifacts import DATA, START_MODEL
    from solon.stages.warmup import Warmup

    recipe = load_recipe("hybrid", {"warmup.preferred": preferred, "warmup.answers_whole": 30})
    data, given = Data(recipe), dict[str, Any]()

    def train_on(run: Any, stage: str, examples: Any, *_: Any, opening_examples: Any, **__: Any) -> str:
        given.update(whole={e.id for e in examples}, opening={e.id for e in opening_examples})
        return "model"

    monkeypatch.setattr(solon.stages.sft, "train_on", train_on)
    run = SimpleNamespace(recipe=recipe, get={DATA: data, START_MODEL: "start"}.get, put=lambda *_: None,
                          constitution=load_constitution("solon"))  # fmt: skip
    Warmup().run(cast("Any", run))
    compared = {c.id for c in data.comparisons}
    demonstrated = {e.id for e in data.demonstrations}
    assert len(given["whole"] & demonstrated) == 30 and demonstrated <= given["whole"] | given["opening"]
    assert not given["whole"] & given["opening"]
    assert bool(given["whole"] & compared) == (preferred == "whole")
    assert bool(given["opening"] & compared) == (preferred == "opening")
    given_all = load_recipe("hybrid", {"warmup.preferred": preferred, "warmup.answers_whole": None})
    run.recipe = given_all
    Warmup().run(cast("Any", run))
    assert demonstrated <= given["whole"] and not given["opening"] & demonstrated
