"""Every model that a command names is looked at before anything is done; odd command lines end in one line."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from solon.cli import app
from solon.engines.look import look_at
from solon.errors import InputError
from solon.recipes.recipe import load_recipe

CANARY = "sk-canary-5b1f0d7e"


class Models:
    """A server that answers GET /v1/models with `answer` and keeps what it saw."""

    def __init__(self) -> None:
        self.answer: tuple[int, Any] = (200, {"data": [{"id": "small"}, {"id": "large:7b"}]})
        self.seen: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
                status, body = outer.answer
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def models() -> Iterator[Models]:
    made = Models()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOLON_API_KEY", "SOLON_API_KEYS", "OPENAI_API_KEY", "SOLON_MODEL"):
        monkeypatch.delenv(name, raising=False)


def refused(spec: str, **options: Any) -> str:
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        look_at({"--model": spec}, **options)
    assert time.monotonic() - began < 8 and "\n" not in str(caught.value)
    return str(caught.value)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_models_that_are_there_pass(tiny: str, models: Models) -> None:
    look_at(
        {"a": tiny, "b": "tiny-random", "c": f"server:small@{models.base_url}", "d": f"server:large@{models.base_url}"}
    )
    assert [seen["path"] for seen in models.seen] == ["/v1/models"] * 2


def test_what_is_no_model_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("not one")
    (tmp_path / "folder").mkdir()
    for spec, says in (
        ("smolm2", "not a model"),
        (str(tmp_path / "none"), "not a model"),
        (str(tmp_path / "folder"), "no config.json"),
        (str(tmp_path / "x.gguf"), "no GGUF file"),
        (str(tmp_path / "y.gguf"), "no such file"),
        ("pytorch_model.bin", "can run code"),
        ("", "is empty"),
        ("server:m", "server:MODEL@http"),
        (f"server:m@http://127.0.0.1:{free_port()}/v1", "no server answers there"),
        (f"systemone:m@http://127.0.0.1:{free_port()}/v1/systemone", "no server answers there"),
        ("decision:nothing-here", "not a model"),
    ):
        assert says in refused(spec)


def test_a_hub_id_without_a_network_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE is set" in refused("someone/some-model")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "the hub cannot be reached" in refused("someone/some-model")


def test_a_server_that_does_not_list_the_model_names_those_it_has(models: Models) -> None:
    assert 'no model "smal"; it has small, large:7b; did you mean "small"?' in refused(f"server:smal@{models.base_url}")
    for answer in (
        (404, b""),
        (200, {"data": []}),
        (200, b"<html>"),
        (500, b""),
        (200, {"data": [{"id": "openai/*"}]}),
    ):
        models.answer = answer
        look_at({"--model": f"server:anything@{models.base_url}"})


def test_the_key_goes_along_and_a_refused_one_is_said(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    look_at({"--model": f"server:small@{models.base_url}"})
    assert models.seen[0]["authorization"] == f"Bearer {CANARY}"
    models.answer = (401, {"error": f"wrong key {CANARY}"})
    said = refused(f"server:small@{models.base_url}")
    assert "refused the key" in said and CANARY not in said


def test_one_key_for_two_hosts_is_refused_before_anything_is_sent(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    two = {"feedback.judge": f"server:small@{models.base_url}", "gold.judge": "server:m@https://other.example/v1"}
    with pytest.raises(InputError, match="SOLON_API_KEY is the key of one host"):
        look_at(two)
    assert models.seen == []


def test_a_recipe_names_all_its_models() -> None:
    recipe = load_recipe("tiny", {"feedback.judge": "a/b", "gold.judge": "c/d"})
    assert recipe.models() == {"model": recipe.model, "feedback.judge": "a/b", "gold.judge": "c/d"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--model", "smolm2"], "smolm2: not a model"),
        (["--set", "feedback.judge=nothing"], "nothing: not a model"),
        (["--set", "gold.judge=./none"], "./none: not a model"),
        (["--set", "model="], "expected a text"),
        (["--set", 'model=""'], "model: the name of the model is empty"),
        (["--model", "server:m@http://127.0.0.1:9/v1"], "this model is trained"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_run_looks_at_its_models_first(overrides: list[str], says: str, dry: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "tiny", "--out", str(tmp_path / "run"), *overrides, *dry])
    assert done.exit_code == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


TRAINING = {
    "sft": ["--data", "solon:demonstrations-harmless"],
    "feedback-model": ["--comparisons", "solon:comparisons-harmless"],
    "reward-model": ["--comparisons", "solon:comparisons-harmless"],
    "ppo": ["--prompts", "solon:helpful", "--reward-model", "none"],
}
ASKING = {
    "critique": ["--prompts", "solon:red-team"],
    "label": ["--pairs", "solon:comparisons-harmless"],
    "evaluate": ["--suite", "attacks"],
}


@pytest.mark.parametrize("verb", TRAINING)
def test_a_training_verb_takes_no_server(verb: str, tmp_path: Path) -> None:
    spec = "server:m@http://127.0.0.1:9/v1"
    done = CliRunner().invoke(app, [verb, *TRAINING[verb], "--out", str(tmp_path / "out"), "--model", spec])
    assert done.exit_code == 2 and "this model is trained" in done.stderr and done.stderr.count("\n") == 1
    assert "server:" not in CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "300"}).output.split("--gold")[0]


ODD = [
    ("--limit", "-1"), ("--limit", "0"), ("--limit", "x"), ("--seed", "-1"), ("--seed", "99999999999999"), ("--model", ""),
    ("--model", "no\x1b[2Jne"), ("--epochs", "0"), ("--epochs", "99999999"), ("--learning-rate", "inf"),
    ("--learning-rate", "nan"), ("--learning-rate", "-1"), ("--learning-rate", "0"), ("--learning-rate", "5"),
    ("--batch-size", "0"), ("--max-length", "-3"), ("--max-length", "1"), ("--layers", "0"), ("--heldout", "nan"),
    ("--heldout", "2"), ("--margin", "nan"), ("--human-weight", "inf"), ("--members", "99"), ("--updates", "0"),
    ("--rollouts", "-1"), ("--max-tokens", "0"), ("--temperature", "inf"), ("--temperature", "-1"), ("--temperature", "nan"),
    ("--revisions", "9"), ("--few-shot", "-1"), ("--top-p", "nan"), ("--principles", "0"), ("--rationales", "-1"),
    ("--clamp", "nan nan"), ("--constitution", ""), ("--constitution", "nonesuch"), ("--max-connections", "0"),
    ("--dtype", "int3"), ("--suite", "x"), ("--out", ""), ("--set", "kl_stop=.nan"), ("--probes", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), ODD)
def test_an_odd_option_is_one_line(option: str, value: str, tiny: str, tmp_path: Path) -> None:
    tried = 0
    for verb, given in {**TRAINING, **ASKING}.items():
        base = {
            "--out": str(tmp_path / f"{verb}.jsonl"),
            "--model": tiny,
            **dict(zip(given[::2], given[1::2], strict=True)),
        }
        base |= {option: value}
        line = [verb, *(part for name, text in base.items() for part in (name, *(text.split() if text else [""])))]
        done = CliRunner().invoke(app, line)
        if "No such option" in done.stderr:
            continue
        tried += 1
        assert done.exit_code == 2, (line, done.output)
        assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())
    assert tried
