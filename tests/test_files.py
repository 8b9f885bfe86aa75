"""What Solon may write over, and how verbs go on with a file: nothing of the user's is lost, nothing stale is taken for new."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from solon import publishing
from solon.cli import app
from solon.constitution import load_constitution
from solon.engines import ScriptedEngine
from solon.engines.base import Completion, Failure, Sampling, Scores
from solon.errors import InputError
from solon.feedback.judge import ModelJudge
from solon.feedback.settings import JudgeSettings
from solon.publishing import MARK, mark_path
from solon.records import Candidates, Pair, Prompt, user
from solon.runs.journal import Journal, read_journal
from solon.stages.revisions import Critique, RevisionSettings
from tests.asking import Called, compare
from tests.asking import label as label_with

RULES = load_constitution("simple")


def rows(path: Path, n: int, word: str = "good") -> str:
    made = [{"id": str(i), "prompt": f"p{i}", "responses": [f"{word} {i}", "bad"]} for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


def judge(name: str = "scripted") -> ScriptedEngine:
    return ScriptedEngine(prefer=lambda r: (1.0, 0.0), reply=lambda r: f"about {r.id}", name=name, fingerprint=name)


def label(
    pairs: str, out: Path, engine: Any = None, how: JudgeSettings | None = None, seed: int = 0, **more: Any
) -> dict[str, Any]:
    asked = ModelJudge(engine or judge(), RULES, how or JudgeSettings(), seed=seed)
    return label_with(pairs, out, asked, **more)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if "solon-lock" not in p.name
    }


# --- directories ---------------------------------------------------------------------------------------------


def part(out: Path, text: str) -> Path:
    made = publishing.new_directory(out)
    (made / "weights").write_text(text)
    (made / "adapters").mkdir()
    (made / "adapters" / "0").write_text(text)
    return made


def test_a_directory_is_replaced_only_where_it_is_empty_or_solons_own(tmp_path: Path) -> None:
    out = tmp_path / "model"
    publishing.publish(part(out, "one"), out)
    publishing.publish(part(out, "two"), out)
    assert (out / "weights").read_text() == "two" and (out / MARK).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (out / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    made = part(out, "three")
    with pytest.raises(InputError, match=r"1 files that Solon did not put there \(thesis.tex\); nothing was changed"):
        publishing.publish(made, out)
    shutil.rmtree(made)
    assert tree(tmp_path) == before


def test_what_a_person_changed_in_a_model_is_kept_when_it_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    for text, change in (("one", "README.md"), ("two", None), ("three", "weights")):
        made = part(out, text)
        (made / "README.md").write_text(f"card {text}")
        publishing.publish(made, out)
        if change:
            (out / change).write_text("my own words")
        else:
            (out / "weights").unlink()  # what is gone is no change to keep
    publishing.publish(part(out, "four"), out)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.earlier", "model.earlier.2"}
    assert (tmp_path / "model.earlier" / "README.md").read_text() == "my own words"
    assert (tmp_path / "model.earlier.2" / "weights").read_text() == "my own words"
    assert (out / "weights").read_text() == "four" and "are kept in" in capsys.readouterr().err
    (out / "weights").unlink()
    (out / "weights").symlink_to("/not/mounted/weights")
    publishing.publish(part(out, "five"), out)
    assert (tmp_path / "model.earlier.3" / "weights").is_symlink()


@given(st.integers(0, 11), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_kill_while_a_directory_is_replaced_loses_neither(
    tmp_path_factory: pytest.TempPathFactory, at: int, first: bool
) -> None:
    folder = tmp_path_factory.mktemp("kill")
    out = folder / "model"
    if not first:
        publishing.publish(part(out, "old"), out)
    made, calls = part(out, "new"), 0

    class Killed(BaseException):
        pass

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > at:
                raise Killed
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            publishing.publish(made, out)
            whole = True
        except Killed:
            whole = False
    publishing.recover(out)
    left = {p.name for p in folder.iterdir()}
    if out.exists():
        said = (out / "weights").read_text()
        assert said == (out / "adapters" / "0").read_text() and said in ("old", "new")
        assert said == "new" or not whole
        assert left == {"model"}
    else:
        assert first and not whole and not left


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (".", "lies in it|the folder you are in"),
        ("/", "the folder you are in|lies in it"),
        ("file.txt", "is a file"),
        ("file.txt/model", "nothing can be written below a file"),
        ("absent/model", "does not exist; make it first: mkdir -p"),
        ("base", "is also an input"),
        ("base/inner", "lies in the input"),
        ("link", "is also an input"),
        ("link/inner", "lies in the input"),
        ("holds", "lies in it"),
        ("work", "files that Solon did not put there"),
        ("git", "files that Solon did not put there"),
        ("n" * 300, "cannot be used|name"),
        ("loop", "cannot be used|is a file"),
        ("nul\0", "NUL"),
    ],
)
def test_a_directory_that_cannot_be_written_is_refused_before_any_work(
    out: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "holds/base2", "work", "git/.git"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "HEAD").write_text("x")
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "loop").symlink_to("loop")
    before = tree(tmp_path)
    with (
        pytest.raises(InputError, match=says) as error,
        publishing.directory(Path(out), ["base", "holds/base2", "solon:red-team", None]),
    ):
        raise AssertionError("work began")
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_one_process_at_a_time_and_no_lock_outlives_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code = "import sys, time; from pathlib import Path; from solon.publishing.places import exclusive; p = Path(sys.argv[1])\n"
    code += "with exclusive(p, p): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another solon process is writing there"):
        label(rows(tmp_path / "in.jsonl", 2), out)
    process.kill()
    process.communicate()
    assert label(str(tmp_path / "in.jsonl"), out)["records"] == 2
    assert not list(tmp_path.glob("*lock*")) and not list(tmp_path.glob(".*"))


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"dear diary", b'{"id": "a"}', b'{"prompt": "p"}\n{"pro', b"\xff\xfe", b"\n"])
def test_a_file_that_is_not_solons_is_never_touched(content: bytes, tmp_path: Path) -> None:
    pairs, out = rows(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    out.write_bytes(content)
    for restart in (False, True):
        with pytest.raises(InputError, match="not known to be Solon's"):
            label(pairs, out, restart=restart)
    assert out.read_bytes() == content and not (tmp_path / "out.trust.json").exists()
    mark_path(out).write_text("{}")
    out.unlink()
    with pytest.raises(InputError, match=r"out.jsonl.solon.json: holds something that Solon did not write"):
        label(pairs, out)


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    pairs = rows(tmp_path / "in.jsonl", 2)
    text = Path(pairs).read_text()
    (tmp_path / "link.jsonl").symlink_to(pairs)
    for out in (Path(pairs), tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="is also an input"):
            label(pairs, out, restart=True)
    assert Path(pairs).read_text() == text


def test_another_identity_is_said_and_restart_begins_anew(tmp_path: Path) -> None:
    pairs, out = rows(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    label(pairs, out)
    kept = out.read_bytes()
    other = load_constitution("solon")
    for call, says in (
        (lambda **k: label(pairs, out, judge("other"), **k), r"model: scripted \[scripted\] → other \[other\]"),
        (lambda **k: label(pairs, out, how=JudgeSettings(soft_labels=False), **k), "judging.soft_labels: True → False"),
        (lambda **k: label(pairs, out, seed=1, **k), "seed: 0 → 1"),
        (lambda **k: label(pairs, out, scheme="tournament", **k), "scheme: all → tournament"),
        (lambda **k: label_with(pairs, out, ModelJudge(judge(), other), **k), r"constitution: \w+ \[.*→"),
    ):
        with pytest.raises(InputError, match=says):
            call()
        assert out.read_bytes() == kept
    label(pairs, out, seed=1, restart=True)
    assert (tmp_path / "out.jsonl.old").read_bytes() == kept
    assert [json.loads(line)["meta"].get("seed") for line in out.read_text().splitlines()] == [None] * 3
    label(pairs, out, restart=True)
    assert (tmp_path / "out.jsonl.old").read_bytes() == kept and (tmp_path / "out.jsonl.old.2").is_file()


def test_more_inputs_go_on_and_changed_ones_are_said(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    label(rows(tmp_path / "in.jsonl", 5), out, limit=3)
    first = out.read_bytes()
    assert label(str(tmp_path / "in.jsonl"), out)["records"] == 5 and out.read_bytes().startswith(first)
    whole = out.read_bytes()
    with pytest.raises(InputError, match=r'out.jsonl:1: was made of another text than "0" has now'):
        label(rows(tmp_path / "in.jsonl", 5, "better"), out)
    with pytest.raises(InputError, match=r"out.jsonl:4: a record of another input"):
        label(rows(tmp_path / "in.jsonl", 3), out)
    assert out.read_bytes() == whole


def test_a_damaged_line_is_named_and_nothing_is_cut(tmp_path: Path) -> None:
    pairs, out = rows(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    label(pairs, out)
    whole = out.read_bytes().splitlines(keepends=True)
    for damage, says in (
        (b'{"id": "1", "chosen": [\n', "not a record"),
        (b"[]\n", "not a record"),
        (b'{"id": 7}\n', "not a record"),
        (whole[0], "stands twice"),
        (b'{"id": "1", "meta": {"input": "x"}}\n', "another text"),
        (whole[1].replace(b'"label":', b'"labels":'), "label: Field required"),
    ):
        out.write_bytes(b"".join([whole[0], damage, *whole[2:]]) + b'{"id": "9')
        damaged = out.read_bytes()
        with pytest.raises(InputError, match=rf"out.jsonl:2: .*{says}"):
            label(pairs, out)
        assert out.read_bytes() == damaged


@given(st.integers(0, 2000))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_cut_at_any_byte_it_is_mended_and_reading_writes_nothing(
    tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "records.jsonl"
    with Journal(path) as journal:
        for i in range(6):
            journal.append({"id": str(i), "text": "ä☃ \u2028 " * i})
    whole = path.read_bytes()
    cut = whole[: at % (len(whole) + 1)]
    path.write_bytes(cut)
    read = [record["id"] for _, record in read_journal(path)]
    assert path.read_bytes() == cut and read == [str(i) for i in range(len(read))]
    assert cut.count(b"\n") <= len(read) <= cut.count(b"\n") + 1
    with Journal(path) as journal:
        assert [r["id"] for _, r in read_journal(path)] == read
        for i in range(6):
            journal.append({"id": str(i), "text": "ä☃ \u2028 " * i})
    assert path.read_bytes() == whole


# --- what failed ---------------------------------------------------------------------------------------------


class Flaky:
    """An engine that cannot answer what `why` gives a reason for: (reason, whether it may pass)."""

    name = fingerprint = "flaky"

    def __init__(self, why: Callable[[str], tuple[str, bool] | None]) -> None:
        self.why, self.usage = why, judge().usage

    def generate(self, requests: Any, sampling: Sampling) -> Any:
        for r in requests:
            found = self.why(r.id)
            yield Completion(r.id, "", False, error=found[0], again=found[1]) if found else Completion(r.id, "x", True)

    def score(self, requests: Any) -> Any:
        for r in requests:
            found = self.why(r.id)
            yield Scores(r.id, (None, None), *found) if found else Scores(r.id, (-0.1, -3.0))


@pytest.mark.parametrize("name", ["flaky", "server:flaky"])
def test_an_outage_is_asked_again_and_a_refusal_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "name", name)
    pairs, out = rows(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"

    def why(i: str) -> tuple[str, bool] | None:
        return {"1": ("503", True), "2": ("refused", False)}.get(i.split("/")[0])

    first = label(pairs, out, Flaky(why))
    assert (first["records"], first["failed"], first["reasons"]) == (3, 2, {"503": 2 - 1, "refused": 1})
    assert first["outcome"].open == 1 and not first["outcome"].nothing
    asked: list[str] = []
    second = label(pairs, out, Flaky(lambda i: asked.append(i)))  # type: ignore[func-returns-value]
    assert second["records"] == 4 and second["failed"] == 1
    # A model in this process is asked the whole batch again, a server what is missing alone.
    assert {i.split("/")[0] for i in asked} == ({"1"} if name.startswith("server:") else {"0", "1", "2", "3"})
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == ["0", "1", "2", "3"] and second["reasons"] == {"refused": 1}


def test_ranked_responses_that_were_out_of_reach_are_told_once_and_not_written(tmp_path: Path) -> None:
    more = Candidates(id="c", prompt=(user("p"),), responses=("a", "b", "c"))
    two = Candidates(id="d", prompt=(user("p"),), responses=("a", "b", "c"))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(c.to_json()) + "\n" for c in (more, two)))
    for scheme in ("all", "tournament"):
        out = tmp_path / f"{scheme}.jsonl"
        engine = Flaky(lambda i: ("503", True) if i.startswith("c/0-1") or i.startswith("c/1-0") else None)
        found = label(str(tmp_path / "in.jsonl"), out, engine, scheme=scheme)
        told = found["outcome"].failures
        assert found["records"] + 3 * len(told) == 6 and set(told) <= {"c"}
        assert found["outcome"].open == len(told)


def test_without_a_listener_an_unanswered_pair_is_an_abstention() -> None:
    pair = Pair(id="a", prompt=(user("p"),), responses=("x", "y"))
    engine: Any = Flaky(lambda i: ("503", True))
    assert [c.abstained for c in compare([pair], engine, RULES)] == [True]
    failed: list[Failure] = []
    assert not list(compare([pair], engine, RULES, failed=failed.append)) and failed == [Failure("a", "503", True)]


def test_a_failed_chain_is_told_with_its_reason(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps(Prompt(prompt=(user(f"p{i}"),), id=f"q{i}").to_json()) + "\n" for i in range(3))
    )

    def why(i: str) -> tuple[str, bool] | None:
        return ("too long", False) if i == "q1/critique-0" else ("503", True) if i == "q2/response" else None

    given: Any = {"prompts": str(prompts), "out": tmp_path / "c.jsonl", "constitution": "simple", "revisions": 1}
    call = Called(Critique, Flaky(why), **given)
    Critique().run(call)
    made: Any = call.outcome
    assert (made.records, made.failed, made.open, made.nothing) == (1, 2, 1, False)
    assert made.reasons == {"too long": 1, "503": 1}


@pytest.fixture
def server() -> Any:
    """An endpoint whose answer to each request is set by `answer`."""
    state: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, value = state["answer"](body)
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{http.server_address[1]}/v1"
    yield state
    http.shutdown()


def answered(text: str) -> dict[str, Any]:
    return {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}


@pytest.mark.parametrize("verb", ["critique", "label"])
def test_a_server_that_refuses_everything_is_exit_1_with_the_reason(verb: str, server: Any, tmp_path: Path) -> None:
    server["answer"] = lambda body: (400, {"error": {"message": "maximum context length is 512 tokens"}})
    given = rows(tmp_path / "in.jsonl", 2)
    named = ["--prompts" if verb == "critique" else "--pairs", given]
    base = [verb, *named, "--model", f"server:m@{server['url']}", "--constitution", "simple", "--quiet", "--json"]
    done = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == 2 and "maximum context length" in next(iter(found["reasons"]))
    assert "maximum context length is 512 tokens" in done.stderr


def test_a_critique_of_some_is_counted(server: Any, tmp_path: Path) -> None:
    server["answer"] = lambda body: (
        (400, {"error": "context"}) if "p1" in json.dumps(body["messages"]) else (200, answered("Fine."))
    )
    base = ["critique", "--prompts", rows(tmp_path / "in.jsonl", 3), "--model", f"server:m@{server['url']}", "--json"]
    done = CliRunner().invoke(app, [*base, "--constitution", "simple", "--out", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["records"], found["failed"]) == (2, 1)
    assert "2 chains; without an answer 1: the server answered 400: context (1)" in done.stderr


def test_the_verb_samples_as_the_recipes_do_and_shows_the_examples() -> None:
    from solon.recipes.recipe import load_recipe

    sampling = RevisionSettings().sampling
    of_verb = {option.name: option.default for option in Critique.options()}
    assert of_verb["few_shot"] is None and RevisionSettings().few_shot is None
    assert all(of_verb[name] == value for name, value in sampling.model_dump(exclude={"repetition_penalty"}).items())
    for name in (
        "hybrid",
        "constitutional",
    ):  # `tiny` samples: a random model's most likely token ends its answer at once
        part = load_recipe(name).supervised
        assert part is not None and part.few_shot is None
        assert part.sampling.model_dump(exclude={"max_tokens"}) == sampling.model_dump(exclude={"max_tokens"})


def test_an_evaluation_writes_over_its_own_results_alone(server: Any, tmp_path: Path) -> None:
    top = [{"token": "A", "logprob": -0.2}, {"token": "B", "logprob": -1.8}]
    choice = answered("A")["choices"][0] | {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
    server["answer"] = lambda body: (200, {"choices": [choice]})
    pairs = [{"id": str(i), "prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    base = ["evaluate", "--suite", "hhh", "--file", str(tmp_path / "in.jsonl"), "--model", f"server:m@{server['url']}"]
    (tmp_path / "mine.json").write_text('{"results": "of a week"}')
    for out, says in (("mine.json", "did not write"), ("in.jsonl", "is also an input"), ("a/b.json", "mkdir -p")):
        before = tree(tmp_path)
        done = CliRunner().invoke(app, [*base, "--quiet", "--out", str(tmp_path / out)])
        assert done.exit_code == 2 and says in done.stderr and tree(tmp_path) == before
    for _ in range(2):
        done = CliRunner().invoke(app, [*base, "--quiet", "--out", str(tmp_path / "own.json")])
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "own.json").read_text())["solon"]


@pytest.mark.parametrize("fault", ["a stranger", "a full disk"])
def test_a_finished_model_is_kept_where_it_cannot_be_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from solon.training import saving as training

    out, part = tmp_path / "m", tmp_path / "part"
    out.mkdir()
    part.mkdir()
    (part / "model.safetensors").write_text("weights")
    if fault == "a stranger":
        (out / "notes.txt").write_text("mine")
    else:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(training, "publish", full)
    with pytest.raises((InputError, OSError), match="the finished model is kept in"):
        training._publish_or_keep(part, out)
    [kept] = tmp_path.glob("m.finished-*")
    assert (kept / "model.safetensors").read_text() == "weights"
    assert fault != "a stranger" or (out / "notes.txt").read_text() == "mine"


def test_a_directory_whose_files_changed_is_not_told_as_done(tmp_path: Path) -> None:
    from solon.publishing import directory, new_directory, publish

    out = tmp_path / "m"
    part = new_directory(out)
    (part / "model.safetensors").write_text("weights")
    publish(part, out)
    with directory(out) as target:
        target.write_result({"verb": "sft"}, {"loss": 1.0})
        assert target.earlier_result({"verb": "sft"}, restart=False) == {"loss": 1.0}
        (out / "model.safetensors").write_text("weigh")
        with pytest.raises(InputError, match="not those that Solon wrote"):
            target.earlier_result({"verb": "sft"}, restart=False)
        (out / "model.safetensors").unlink()
        with pytest.raises(InputError, match="not those that Solon wrote"):
            target.earlier_result({"verb": "sft"}, restart=False)
        assert target.earlier_result({"verb": "sft"}, restart=True) is None
