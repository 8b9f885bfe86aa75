"""Laws of critique and revision: the principle reaches the model, the seed decides which, each step builds on the last."""

from __future__ import annotations

from solon.constitution import Constitution, Example, Principle, draw_principles, load_constitution
from solon.data import read_revision_chains
from solon.engines import GenerationRequest, Sampling, ScriptedEngine
from solon.records import Comparison, Message, Prompt, RevisionChain, assistant, user
from solon.supervised.critique_revision import critique_chat, fill, revise, revision_chat
from solon.supervised.dataset import (
    contests,
    from_chains,
    from_choices,
    from_demonstrated_revisions,
    from_responses,
    mix,
    whole_sentences,
)

RULES = Constitution(
    name="r",
    version="1",
    description="for tests",
    principles=tuple(
        Principle(
            id=name,
            title=name,
            critique=f"Criticise {name}.",
            revision=f"Revise {name}.",
            comparison=f"Which is more {name}?",
            examples=(Example(prompt="P", response="R", critique="C", revision="V"),),
        )
        for name in ("kind", "short", "true")
    ),
)
PROMPTS = [Prompt(prompt=(user(f"question {i}"),), id=f"q{i}") for i in range(5)]


def reply(request: GenerationRequest) -> str:
    """Says which request it saw last, and how long the conversation was."""
    return f"[{len(request.chat)}] {request.chat[-1].content}"


def run(**options: object) -> list:
    return list(revise(PROMPTS, ScriptedEngine(reply=reply), RULES, sampling=Sampling(), **options))


def test_each_step_is_asked_in_its_principles_words() -> None:
    for chain in run(revisions=3):
        assert len(chain.steps) == 3
        for step in chain.steps:
            assert step.critique == f"[3] Criticise {step.principle}."
            assert step.revision == f"[5] Revise {step.principle}."


def test_a_step_revises_the_last_revision() -> None:
    seen: list[str] = []

    def watch(request: GenerationRequest) -> str:
        if request.id.endswith("critique-1"):
            seen.append(request.chat[1].content)
        return reply(request)

    chains = list(revise(PROMPTS, ScriptedEngine(reply=watch), RULES, revisions=2, sampling=Sampling()))
    assert seen == [c.steps[0].revision for c in chains]


def test_the_seed_decides_the_principles() -> None:
    drawn = [[s.principle for c in run(revisions=2, seed=seed) for s in c.steps] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {"kind", "short", "true"}


def test_no_principle_twice_before_all_were_drawn() -> None:
    for i in range(20):
        assert len({p.id for p in draw_principles(RULES, 3, i)}) == 3
    assert len(draw_principles(RULES, 5, 0)) == 5


def test_direct_revision_has_no_critique() -> None:
    for chain in run(revisions=1, direct=True):
        assert chain.steps[0].critique == "" and chain.steps[0].revision.startswith("[3] Revise")


def test_few_shot_examples_stand_before_the_conversation() -> None:
    for chain in run(revisions=1, few_shot=1):
        assert chain.steps[0].critique.startswith("[9]")  # six example turns, then three


def test_the_system_message_of_a_prompt_stays_first_before_few_shot_examples() -> None:
    principle, system = RULES.principles[0], Message(role="system", content="You work for a bank.")
    for few_shot in (0, 1):
        bare = critique_chat((user("q"),), "r", principle, few_shot)
        assert critique_chat((system, user("q")), "r", principle, few_shot) == (system, *bare)
        bare = revision_chat((user("q"),), "r", None, principle, few_shot)
        assert revision_chat((system, user("q")), "r", None, principle, few_shot) == (system, *bare)


def test_responses_may_come_from_another_model() -> None:
    other = ScriptedEngine(reply=lambda r: "from the start model")
    chains = list(revise(PROMPTS, ScriptedEngine(reply=reply), RULES, sampling=Sampling(), responder=other))
    assert all(c.response == "from the start model" != c.steps[0].revision for c in chains)


def test_only_prompts_of_the_source_asked_for_are_revised() -> None:
    prompts = [p.model_copy(update={"source": "helpful" if i % 2 else "red_team"}) for i, p in enumerate(PROMPTS)]
    asked: list[str] = []

    def watch(request: GenerationRequest) -> str:
        asked.append(request.id)
        return reply(request)

    chains = list(revise(prompts, ScriptedEngine(reply=watch), RULES, sampling=Sampling(), only="red_team"))
    assert [c.id for c in chains] == [p.id for p in prompts]
    assert [len(c.steps) for c in chains] == [2, 0, 2, 0, 2]
    assert not any(i.startswith(("q1/", "q3/")) and not i.endswith("/response") for i in asked)
    learned, left_out = from_responses(c for c in chains if not c.steps)
    assert [e.messages[-1].content for e in learned] == [chains[1].response, chains[3].response] and left_out == {}
    assert learned[0].meta["principles"] == []  # no principle shaped it


def test_a_cut_response_is_learned_up_to_its_last_whole_sentence() -> None:
    def chain(text: str, ended: bool) -> RevisionChain:
        return RevisionChain(id=text, prompt=(user("q"),), response=text, steps=(), meta={"ended": [ended]})

    learned, left_out = from_responses(
        [
            chain("One. Two is cut he", False),
            chain("No sentence ends he", False),
            chain("No end, but whole", True),
            chain("", True),
        ]
    )
    assert [e.messages[-1].content for e in learned] == ["One.", "No end, but whole"]
    assert left_out == {"cut at the token limit": 1, "empty revision": 1}
    assert whole_sentences('He said "go." Then') == 'He said "go."' and whole_sentences("Done!") == "Done!"
    assert whole_sentences("1. Wash it.\n2. Dry") == "1. Wash it." and whole_sentences("It costs 3.50 or") == ""
    assert (
        whole_sentences("Go. Ask Dr. No") == "Go."
        and whole_sentences("Wash it. 2. Dry it. 10. Put") == "Wash it. 2. Dry it."
    )


def test_the_end_of_a_cut_response_is_not_learned(tiny: str) -> None:
    """Law: a response that was cut teaches its words, and not to stop after them. One that ended teaches its end."""
    from solon.models.chat.encode import end_ids
    from solon.models.weights import load_tokenizer
    from solon.supervised.sft import IGNORE, encode

    tokenizer = load_tokenizer(tiny)

    def learned(response: str, ended: bool) -> list[int]:
        chain = RevisionChain(id="1", prompt=(user("q"),), response=response, steps=(), meta={"ended": [ended]})
        [example], _ = from_responses([chain])
        return [label for label in encode(tokenizer, example, system=None)["labels"] if label != IGNORE]

    whole, cut = learned("Wash it. Dry it.", True), learned("Wash it. Dry it. Put", False)
    assert whole[-1] in end_ids(tokenizer) and cut == whole[:-1]


def test_filling_is_one_pass_over_known_names() -> None:
    text = fill("a {response} {x.__class__} {prompt}", prompt="P", response="{prompt} {critique}", critique="C")
    assert text == "a {prompt} {critique} {x.__class__} P"


def test_the_classic_templates_carry_the_response_word_for_word() -> None:
    chain = next(iter(revise(PROMPTS, ScriptedEngine(reply=reply), load_constitution("simple"), sampling=Sampling())))
    assert f"Response: {chain.response}\n\nCritique:" in chain.steps[0].critique
    assert f"Critique: {chain.steps[0].critique}\n\nRevised Response:" in chain.steps[0].revision


def test_sft_examples_are_the_revisions() -> None:
    chains = run(revisions=2)
    final, left_out = from_chains(chains, "final")
    every, _ = from_chains(chains, "all")
    assert [e.messages[-1].content for e in final] == [c.steps[-1].revision for c in chains]
    assert len(every) == 2 * len(final) and left_out == {}
    assert all(e.messages[:-1] == c.prompt for e, c in zip(final, chains, strict=True))
    cut = [c.model_copy(update={"meta": {"ended": [True, True, False]}}) for c in chains]
    # An answer cut off would teach not to stop; what teaches nothing is counted by its reason.
    assert from_chains(cut, "final") == ([], {"cut at the token limit": len(cut)})
    stepless = cut[0].model_copy(update={"steps": ()})
    empty = cut[1].model_copy(update={"steps": (cut[1].steps[0], cut[1].steps[1].model_copy(update={"revision": " "}))})
    assert from_chains([stepless, empty, chains[2]], "final")[1] == {"no revision": 1, "empty revision": 1}
    assert from_chains([stepless], "all") == ([], {"no revision": 1})


def test_every_shipped_revision_is_learned() -> None:
    chains = read_revision_chains("solon:revision-demonstrations")
    examples, left_out = from_chains(chains)
    assert len(examples) == len(chains) and not left_out


def choice(chain: RevisionChain, chosen: str, rejected: str, label: float | None) -> Comparison:
    return Comparison(
        id=chain.id, prompt=chain.prompt, chosen=(assistant(chosen),), rejected=(assistant(rejected),), label=label,
        first="chosen" if chosen == chain.steps[-1].revision else "rejected",
    )  # fmt: skip


def test_what_the_judge_prefers_is_learned() -> None:
    chains = run(revisions=2)
    last = [c.steps[-1].revision for c in chains]
    assert [p.responses for p in contests(chains)] == [(v, c.response) for v, c in zip(last, chains, strict=True)]
    choices = [
        choice(chains[0], last[0], chains[0].response, 0.9),
        choice(chains[1], chains[1].response, last[1], 0.9),
        choice(chains[2], chains[2].response, last[2], 0.5),  # a tie and an abstention prefer nothing
        choice(chains[3], chains[3].response, last[3], None),
    ]
    learned, left_out = from_choices(chains, choices)
    texts = [e.messages[-1].content for e in learned]
    assert texts == [last[0], chains[1].response, last[2], last[3], last[4]] and left_out == {}
    assert learned[0].meta["principles"] == [s.principle for s in chains[0].steps]
    assert learned[1].meta["principles"] == []  # no principle shaped it
    assert [e.meta["prompt_id"] for e in learned] == [c.id for c in chains]


def test_only_whole_texts_compete_and_are_learned() -> None:
    chains = [
        c.model_copy(update={"meta": {"ended": ended}})
        for c, ended in zip(
            run(revisions=1), ([True, False], [False, True], [False, False], [True, True]), strict=False
        )
    ]
    assert [p.id for p in contests(chains)] == [chains[3].id]
    learned, left_out = from_choices(chains, [])
    texts = [chains[0].response, chains[1].steps[-1].revision, chains[3].steps[-1].revision]
    assert [e.messages[-1].content for e in learned] == texts and left_out == {"cut at the token limit": 1}


def test_demonstrated_revisions_are_asked_as_they_will_be() -> None:
    [chain] = run(revisions=1)[:1]
    [example], left_out = from_demonstrated_revisions([chain], RULES)
    assert left_out == {}
    other = chain.model_copy(update={"steps": (chain.steps[0].model_copy(update={"principle": "none-of-these"}),)})
    assert from_demonstrated_revisions([other], RULES) == (
        [],
        {"step under a principle that the constitution does not have": 1},
    )
    name = chain.steps[0].principle
    assert [m.content for m in example.messages][2::2] == [f"Criticise {name}.", f"Revise {name}."]
    assert example.train_turns == (3, 5)


def test_mixing_gives_the_share_asked_for() -> None:
    examples = from_chains(run(revisions=1))[0]
    kept = [e.model_copy(update={"id": f"k{i}"}) for i, e in enumerate(examples * 4)]
    assert len(mix(examples, kept, 0.5)) == 10 and len(mix(examples, kept, 0.0)) == 5
