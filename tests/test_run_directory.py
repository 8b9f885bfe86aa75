"""A run's directory: what is gone or damaged is made again or said, what failed is told, and no request is forgotten."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from solon import publishing
from solon.engines.base import Failure, ScriptedEngine
from solon.errors import InputError, Outage
from solon.publishing import MARK
from solon.recipes.recipe import load_recipe
from solon.records import Pair, Prompt, user
from solon.runs.journal import Tally
from solon.runs.run import Run

ITEMS = [Prompt(prompt=(user(f"question {n}"),), id=f"p{n}") for n in range(20)]
RECIPE = load_recipe("tiny")


def stage(
    out: Path,
    items: Sequence[Prompt] = ITEMS,
    why: Callable[[str], tuple[str, bool] | None] = lambda i: None,
    dies_at: str = "",
    made_from: Callable[[], dict[str, Any]] = dict,
) -> tuple[list[Pair], dict[str, Any], list[str]]:
    """A stage of pairs: its records, its state, and the items that were worked on."""
    worked: list[str] = []
    engine = ScriptedEngine(reply=lambda r: "x")
    with Run(RECIPE, out, quiet=True) as run:

        def make(batch: Sequence[Prompt]) -> Iterator[Pair]:
            for p in batch:
                worked.append(p.id)
                engine.usage.add(1, 10, 2, 0.5)
                if p.id == dies_at:
                    raise KeyboardInterrupt
                if found := why(p.id):
                    run.fail(Failure(p.id, *found))
                    continue
                yield Pair(id=p.id, prompt=p.prompt, responses=("a", p.id))

        made = run.records("pairs", items, make, Pair, engines=(engine,), made_from=made_from())
        return made, run.state("pairs"), worked


def test_the_ledger_holds_the_requests_of_a_batch_that_was_not_finished(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for at in ("p5", "p0", "p13"):
        with pytest.raises(KeyboardInterrupt):
            stage(out, dies_at=at)
    made, state, worked = stage(out)
    asked = 6 + 1 + (8 + 6) + len(worked)  # batches of eight
    assert len(made) == 20 and state["done"]
    assert (state["requests"], state["prompt_tokens"], state["completion_tokens"]) == (asked, 10 * asked, 2 * asked)
    assert state["cost_usd"] == pytest.approx(0.5 * asked)
    with (out / "pairs" / "usage.jsonl").open("ab") as file:
        file.write(b"[1, 10")  # a kill in the middle of a line
    (out / "pairs" / "stage.json").unlink()
    assert stage(out)[1]["requests"] == asked


def test_records_that_are_gone_are_made_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = stage(out)[0]
    path = out / "pairs" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for left in (b"", b"".join(lines[:7]), b"".join(lines)[:-30], b"".join(lines[3:] + lines[:1])):
        path.write_bytes(left)
        made, state, worked = stage(out)
        assert made == whole and worked and state["done"] and state["records"] == 20
    path.unlink()
    assert stage(out)[0] == whole
    assert not stage(out)[2]  # nothing is left to do


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"done": true}', '{"done": true, "records": 20}', "\0" * 40])
def test_a_damaged_stage_is_one_line_that_says_what_to_remove(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = stage(out)[0]
    path = out / "pairs" / "stage.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"pairs/stage.json: is damaged; remove this file") as error:
        stage(out)
    assert "\n" not in str(error.value)
    path.unlink()
    made, state, worked = stage(out)
    assert made == whole and not worked and state["requests"] == 20


def test_a_damaged_journal_is_named_and_nothing_is_cut(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stage(out)
    path = out / "pairs" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"\xff\n", lines[0], lines[4].replace(b'"responses"', b'"answers"')):
        path.write_bytes(b"".join([*lines[:4], damage, *lines[5:]]))
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"records.jsonl:5: the journal is damaged"):
            stage(out)
        assert path.read_bytes() == before


def test_a_record_of_another_text_is_not_taken_for_its_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stage(out)
    other = [p.model_copy(update={"prompt": (user("changed"),)}) if p.id == "p3" else p for p in ITEMS]
    made, state, worked = stage(out, other)
    assert made[3].prompt == (user("changed"),) and len(worked) == 20
    assert (out / "pairs.earlier-1" / "records.jsonl").is_file()
    assert state["requests"] == 40  # what the first ones cost is not forgotten


def test_a_tally_with_lines_that_are_none_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text("[1, 2, 3, null]\n" + "[" * 5000 + "\n[1e999, 0, 0, 0]\n{}\n[1, 2, 3, 0.5]\n")
    assert Tally(path).used.requests == 2


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path: Path) -> None:
    publishing.write_whole(tmp_path / "a.json", json.dumps({"text": "a \ud83d b"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == {"text": "a \ud83d b"}


def test_what_failed_for_good_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def why(i: str) -> tuple[str, bool] | None:
        return ("refused", False) if i in ("p2", "p9") else ("too long", False) if i == "p4" else None

    made, state, _ = stage(out, why=why)
    assert len(made) == 17 and state["done"] and state["missing"] == 3
    assert state["reasons"] == {"refused": 2, "too long": 1}
    assert not stage(out)[2] and len(stage(out)[0]) == 17  # later stages were made with these; it stays so


def test_an_outage_ends_the_run_and_is_asked_once_more(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def why(i: str) -> tuple[str, bool] | None:
        return ("the server answered 503", True) if i in ("p2", "p9") else None

    with pytest.raises(Outage, match=r"2 of 20 records of the stage pairs are missing, .*\(the server answered 503\)"):
        stage(out, why=why)
    made, state, worked = stage(out)
    assert len(made) == 20 and {"p2", "p9"} <= set(worked) and state["missing"] == 0
    shutil.rmtree(out)
    with pytest.raises(Outage):
        stage(out, why=why)
    made, state, _ = stage(out, why=why)  # it never answers these two: the run is not held up for ever
    assert len(made) == 18 and state["done"] and state["reasons"] == {"the server answered 503": 2}


def train(out: Path, text: str = "weights", examples: int = 3) -> tuple[dict[str, Any], list[str]]:
    worked: list[str] = []
    with Run(RECIPE, out, quiet=True) as run:

        def work(step: Any) -> dict[str, Any]:
            worked.append("trained")
            part = publishing.new_directory(run.model("sl-cai"))
            (part / "config.json").write_text("{}")
            (part / "model.safetensors").write_text(text)
            publishing.publish(part, run.model("sl-cai"))
            return {"examples": 3}

        made_from = {"examples": {"name": f"{examples} records", "fingerprint": str(examples)}}
        return run.once("sl-cai", work, makes=run.model("sl-cai"), made_from=made_from), worked


def test_a_model_that_is_gone_is_made_again_and_one_that_changed_is_said(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(out) == ({"examples": 3}, ["trained"]) and train(out) == ({"examples": 3}, [])
    model = out / "models" / "sl-cai"
    shutil.rmtree(model)
    assert train(out)[1] == ["trained"]
    (model / "model.safetensors").write_text("others")
    with pytest.raises(InputError, match=r"models/sl-cai: is not the model that the stage sl-cai wrote"):
        train(out)
    (model / "thesis.txt").write_text("mine")
    shutil.rmtree(out / "sl-cai")
    with pytest.raises(InputError, match=r"files that Solon did not put there \(thesis.txt\)"):
        train(out)
    assert (model / "thesis.txt").read_text() == "mine"


def test_what_was_made_from_something_else_is_set_aside_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from solon.publishing.content import of_directory

    out = tmp_path / "run"
    model = out / "models" / "sl-cai"

    def made_from() -> dict[str, Any]:
        return {"model": {"name": "sl-cai", "fingerprint": of_directory(model)}}

    train(out)
    stage(out, made_from=made_from)
    shutil.rmtree(model)
    train(out)  # the same once more: what was made from it stands
    assert stage(out, made_from=made_from)[2] == []
    shutil.rmtree(model)
    train(out, "other weights")
    assert len(stage(out, made_from=made_from)[2]) == 20
    assert (out / "pairs.earlier-1" / "records.jsonl").is_file()
    assert train(out, "new weights", examples=4)[1] == ["trained"]  # a training knows its examples
    assert (out / "sl-cai.earlier-1" / "stage.json").is_file()
    assert len(stage(out, made_from=made_from)[2]) == 20 and train(out, examples=4)[1] == []


def test_a_kill_before_the_first_batch_is_done_does_not_mix_what_two_models_said(tmp_path: Path) -> None:
    def by(fingerprint: str) -> Callable[[], dict[str, Any]]:
        return lambda: {"model": {"name": "m", "fingerprint": fingerprint}}

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        stage(out, dies_at="p5", made_from=by("1"))
    assert len(stage(out, made_from=by("2"))[2]) == 20
    (out / "pairs" / "made_from.json").unlink()  # a run of an older Solon: from the next start on it is known
    assert stage(out, made_from=by("3"))[2] == [] and len(stage(out, made_from=by("4"))[2]) == 20


def test_a_kill_while_a_model_is_published_is_mended_at_the_next_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out)
    model = out / "models" / "sl-cai"
    model.rename(model.with_name(".sl-cai.solon-old"))
    assert train(out)[1] == [] and model.is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml", "report.md", ".git"])
def test_a_users_directory_is_no_runs_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="is no run of Solon's"):
        stage(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(InputError, match="is a file"):
        stage(tmp_path / name)


def test_a_run_of_an_older_solon_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = stage(out)[0]
    (out / MARK).unlink()
    (out / "pairs" / "usage.jsonl").unlink()
    path = out / "pairs" / "records.jsonl"
    path.write_text(re.sub(r', "input": "\w+"|"input": "\w+"', "", path.read_text()))
    made, state, worked = stage(out)
    assert [p.responses for p in made] == [p.responses for p in whole] and not worked
    assert state["requests"] == 20 and (out / MARK).is_file()


def test_weights_that_changed_under_a_run_are_said(tiny: str, tmp_path: Path) -> None:
    from solon.recipes.pipeline import models_used

    recipe = load_recipe("rlaif", {"model": str(tmp_path / "base"), "feedback.judge": str(tmp_path / "judge")})
    for name in ("base", "judge"):
        shutil.copytree(tiny, tmp_path / name)

    def claim() -> None:
        with Run(recipe, tmp_path / "run", quiet=True) as run:
            run.claim("models.json", json.dumps(models_used(recipe, recipe.model)))

    claim()
    (tmp_path / "base" / "README.md").write_text("a card")
    claim()
    path = tmp_path / "judge" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-101] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"models.json: this run was started with another models \(feedback.judge: \w+ →"
    ):
        claim()


def test_killed_and_stopped_runs_end_as_an_undisturbed_one() -> None:
    from benchmarks.kills import interrupted

    found = interrupted(3, seed=1, short=True)
    assert found["kills"] + found["ctrl_c"] == 3 and found["different"] == []
    assert found["undisturbed"]["asked"] == found["undisturbed"]["told"] > 20
