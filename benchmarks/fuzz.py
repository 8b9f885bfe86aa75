"""Files, command lines, models and runs that are slightly or badly wrong, thousands of them, by a seed.

    python -m benchmarks.fuzz --data 5000 --recipes 1000 --constitutions 1000 --lines 100 --models 200 --runs 100

Valid inputs of every form are mutated and given to the real readers and verbs, in this process, with the tiny model. Each
outcome is one of: `accepted`, `said` (one line that a person can act on), and four that must not happen: `traceback`,
`long` (more than one line), `lost` (records that are neither returned nor counted), `unwritable` (accepted, but what is
written from it does not read back as the same). Prints the counts and an example of each fault; exit 1 if there is any.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kills import records

NOTES = ("under its own", "made again")  # so end what a run tells of itself; a line of an error may follow
BAD = ("traceback", "long", "lost", "unwritable")
U, A = {"role": "user", "content": "What is tea?"}, {"role": "assistant", "content": "A drink."}
B = {"role": "assistant", "content": "No."}
HH = "\n\nHuman: What is tea?\n\nAssistant: "
STEP = {"principle": "no-harm", "critique": "c", "revision": "r"}
JUDGED = {"principle": "p", "forward": 0.7, "swapped": 0.6, "weight": 1.0}
FORMS: dict[str, list[dict[str, Any]]] = {
    "prompts": [
        {"prompt": "What is tea?"}, {"id": "a", "prompt": [U], "source": "helpful", "tags": ["x"]}, {"messages": [U, A]},
        {"prompt": HH}, {"chosen": HH + "a", "rejected": HH + "b"}, {"conversations": [{"from": "human", "value": "q"}]},
    ],
    "demonstrations": [
        {"messages": [U, A], "id": "d"}, {"prompt": "q", "completion": "a"}, {"instruction": "q", "input": "", "output": "a"},
        {"text": HH + "a"}, {"messages": [U, A, U, A], "train_turns": [1, 3]}, {"system": "s", "conversations": [U, A]},
    ],
    "comparisons": [
        {"id": "c", "prompt": [U], "chosen": [A], "rejected": [B], "label": 0.9, "judgements": [JUDGED], "labeler": "ai"},
        {"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": [U, A, U, A], "rejected": [U, A, U, B]},
        {"chosen": HH + "a", "rejected": HH + "b"}, {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "id": 7},
        {"prompt": "q", "chosen": "a", "rejected": "b", "label": None, "abstained": True},
        {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "x", "chosen_model": "m", "rejected_model": "n"},
    ],
    "pairs": [
        {"id": "p", "prompt": [U], "responses": ["a", "b"], "human": 1.0}, {"prompt": "q", "responses": ["a", "b"], "authors": ["m", "n"]},
        {"prompt": "q", "chosen": [U, A], "rejected": [U, B], "prompt_id": "x", "score_chosen": 6.0},
        {"instruction": "q", "completions": [{"model": "m", "response": "a"}, {"model": "n", "response": "b"}]},
    ],
    "chains": [{"id": "r", "prompt": [U], "response": "a", "steps": [STEP, STEP], "source": "red_team", "meta": {"x": 1}}],
    "items": [{"prompt": "q", "corrects": ["(A)"], "text_correct": HH + "a", "text_incorrect": HH + "b"}],
}  # fmt: skip
ODD: list[Any] = [
    None, "", " ", "\n", 0, -1, 1, 2, 0.5, 8.5, 1e300, True, False, [], {}, [[]], [None], {"role": "user"}, "x" * 5000, "\x1b[2J",
    "\u202e", "\0", "\ud800", "[red]x[/red]", "{prompt}", "<|im_end|>", [U], [A], [B, U], "NaN", "0.7", 10**30, ["a", 3],
]  # fmt: skip
RAW = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"{", b"[", b"}", b"]", b",", b'"', b"\\", b"\\u12", b"\xff", b"\0", b"\x1b", b"1" * 5000,
       b"[" * 3000, b"'", b"//", b"\r", b"\xef\xbb\xbf", b"\n", b"\\ud83d"]  # fmt: skip


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one place in it changed."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places:
        return rng.choice(ODD)
    node, key = rng.choice(places)
    act = rng.randrange(5)
    if act == 0:
        del node[key]
    elif act == 1 and isinstance(node, list):
        node.insert(key, rng.choice(ODD))
    elif act == 2 and isinstance(node, dict):
        node[
            rng.choice(["label", "id", "meta", "source", "human", "steps", "messages", "prompt", "abstained", "x"])
        ] = rng.choice(ODD)
    else:
        node[key] = rng.choice(ODD)
    return value


def data_file(rng: random.Random, folder: Path, kind: str) -> Path:
    """A file of that kind of record with faults in it, or none."""
    values: list[Any] = [copy.deepcopy(rng.choice(FORMS[kind])) for _ in range(rng.choice((1, 2, 5)))]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randrange(len(values))
        values[at] = mutated(rng, values[at])
    lines = [json.dumps(v, ensure_ascii=rng.random() < 0.7 or has_half(v)).encode() for v in values]
    if rng.random() < 0.3:
        at = rng.randrange(len(lines))
        cut = rng.randrange(len(lines[at]) + 1)
        lines[at] = rng.choice(
            [lines[at][:cut], lines[at][:cut] + rng.choice(RAW) + lines[at][cut:], lines[at] * 2, b""]
        )
    content = rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines) + rng.choice([b"\n", b""])
    path = folder / f"{kind}.jsonl"
    if rng.random() < 0.05:
        content = content.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"]))
    if rng.random() < 0.08:
        path = path.with_suffix(".jsonl.gz")
        content = gzip.compress(content)
        if rng.random() < 0.6:
            cut = rng.randrange(len(content))
            content = rng.choice(
                [content[:cut], content[:cut] + b"\0\1\2" + content[cut + 3 :], content + b"x", content * 2]
            )
    path.write_bytes(content)
    return path


def has_half(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def outcome(work: Callable[[], str]) -> tuple[str, str]:
    """What became of one input, and in which words."""
    from solon.errors import InputError

    try:
        return work(), ""
    except InputError as error:
        return ("long" if "\n" in str(error) else "said"), str(error)
    except Exception:
        return "traceback", traceback.format_exc()


def fuzz_data(rng: random.Random, folder: Path) -> tuple[str, str]:
    from solon.analysis.suites import read_items
    from solon.data import readers
    from solon.records import Comparison, Pair, Prompt, RevisionChain, SFTExample

    kind = rng.choice(list(FORMS))
    path = data_file(rng, folder, kind)
    read: Any = {
        "prompts": readers.read_prompts, "demonstrations": readers.read_demonstrations, "comparisons": readers.read_comparisons,
        "pairs": readers.read_pairs, "chains": readers.read_revision_chains, "items": read_items,
    }[kind]  # fmt: skip
    record = {
        "prompts": Prompt,
        "demonstrations": SFTExample,
        "comparisons": Comparison,
        "pairs": Pair,
        "chains": RevisionChain,
    }.get(kind)
    told: list[str] = []

    def work() -> str:
        before, readers.note = readers.note, told.append
        try:
            found = read(str(path))
            streamed = list(stream := readers.stream_pairs(str(path))) if kind == "pairs" else []
        finally:
            readers.note = before
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = sum(bool(line.strip()) for line in content.split(b"\n"))
        repeated = sum(int(number) for text in told for number in re.findall(r": (\d+) of its records", text))
        if kind != "items" and len(found) + repeated < lines:
            return "lost"
        if kind == "pairs" and len(streamed) + stream.repeated != lines:
            return "lost"
        for item in found if record else []:
            text = json.dumps(item.to_json(), ensure_ascii=False, allow_nan=False)
            text.encode()
            if record is not None and record.model_validate(json.loads(text)) != item:
                return "unwritable"
        return "accepted"

    result, words = outcome(work)
    return result, f"{words}\n{path.read_bytes()[:600]!r}"


YAML_ODD = ["&a x", "*a", "!!python/object:os.system x", "!!int 3", ".inf", ".nan", "1e999", "null", "", "[", "]", "{a: 1", "yes", "0x1F", "2024-99-99",
            "-1", "0", "3", "1.5", "true", '"3"', "'", '"\\ud800"', "\x00", "\x1b[2J", "[" * 2000, "|", ">-", "? x", "- x", "---", "\t", "\u2028",
            "a: b: c", "%TAG", "server:m@http://127.0.0.1:9/v1", "smolm2", "../../x", "x" * 3000, '"\\U00110000"', "<<: *a", "@", "`"]  # fmt: skip


def yaml_text(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        line, act = lines[at], rng.randrange(7)
        if act == 0:
            del lines[at]
        elif act == 1:
            lines.insert(at, line)
        elif act == 2:
            lines[at] = " " * rng.randrange(5) + line.strip()
        elif act == 3:
            lines.insert(at, rng.choice(YAML_ODD))
        elif act == 4 and line:
            cut = rng.randrange(len(line))
            lines[at] = line[:cut] + rng.choice(YAML_ODD) + line[cut:]
        else:
            lines[at] = re.sub(r"(:|-)\s.*", lambda m: f"{m[1]} {rng.choice(YAML_ODD)}", line, count=1)
        lines = lines or [""]
    return "\n".join(lines)


def fuzz_recipe(rng: random.Random, folder: Path) -> tuple[str, str]:
    from solon.recipes.recipe import builtin_recipes, load_recipe
    from solon.runs.common import dump_recipe

    path = folder / "recipe.yaml"
    name = rng.choice(list(builtin_recipes()))
    text = builtin_recipes()[name].read_text() if rng.random() < 0.5 else dump_recipe(load_recipe(name))
    path.write_text(yaml_text(rng, text), encoding="utf-8", errors="replace", newline="")

    def work() -> str:
        recipe = load_recipe(str(path))
        again = folder / "again.yaml"
        again.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
        return "accepted" if load_recipe(str(again)) == recipe else "unwritable"

    result, words = outcome(work)
    return result, f"{words}\n{path.read_text(errors='replace')[:600]!r}"


def fuzz_constitution(rng: random.Random, folder: Path) -> tuple[str, str]:
    from solon.constitution import builtin_names, load_constitution, to_yaml
    from solon.constitution.files import parse_constitution

    text = yaml_text(rng, to_yaml(load_constitution(rng.choice(builtin_names()))))

    def work() -> str:
        made = parse_constitution(text.encode("utf-8", "replace"), "c.yaml")
        return "accepted" if parse_constitution(to_yaml(made).encode(), "again.yaml") == made else "unwritable"

    result, words = outcome(work)
    return result, f"{words}\n{text[:600]!r}"


VERBS = {
    "critique": ["--prompts"], "label": ["--pairs"], "sft": ["--data"], "feedback-model": ["--comparisons"],
    "reward-model": ["--comparisons"], "evaluate": ["--suite", "--file"], "run": [], "score": ["--input", "--reward-model"],
    "ppo": ["--prompts", "--reward-model"], "report": [], "recipes": [], "constitution": [], "env": [],
}  # fmt: skip
VALUES = ["", " ", "0", "-1", "1", "nan", "inf", "x", "99999999999999999999", "1e-5", "/nonexistent/x", "/", ".", "..", "\x1b[2J", "solon:red-team", "solon:nope",
          "simple", "hybrid", "tiny", "hhh", "attacks", "server:m@http://127.0.0.1:9/v1", "server:", "a/b", "--", "-x", "ls", "show", "validate", "é", "x" * 5000]  # fmt: skip
OPTIONS = ["--limit", "--seed", "--out", "--model", "--constitution", "--epochs", "--learning-rate", "--batch-size", "--max-tokens", "--temperature", "--set",
           "--layers", "--heldout", "--revisions", "--few-shot", "--principles", "--dtype", "--system", "--json", "--quiet", "--dry-run", "--restart"]  # fmt: skip


def fuzz_line(rng: random.Random, folder: Path, tiny: str) -> tuple[str, str]:
    verb = rng.choice(list(VERBS))
    line = [verb]
    for option in VERBS[verb]:
        if rng.random() < 0.9:
            line += [option, rng.choice([*VALUES, "solon:comparisons-harmless", str(folder)])]
    for option in rng.sample(OPTIONS, rng.randrange(4)):
        line += [option] if option in ("--json", "--quiet", "--dry-run", "--restart") else [option, rng.choice(VALUES)]
    if rng.random() < 0.8 and "--out" not in line and verb not in ("report", "recipes", "constitution", "env"):
        line += ["--out", str(folder / rng.choice(["o.jsonl", "o", "deep/er/o.jsonl"]))]
    if "--model" not in line and verb not in ("run", "report", "recipes", "constitution", "env", "score"):
        line += ["--model", tiny]
    if "--limit" not in line and verb not in ("run", "report", "recipes", "constitution", "env"):
        line += ["--limit", "2"]
    if rng.random() < 0.3:
        line.insert(rng.randrange(1, len(line) + 1), rng.choice(VALUES))
    if verb == "run" and "--dry-run" not in line:
        line.append("--dry-run")
    return command(line, folder)


def command(line: list[str], folder: Path) -> tuple[str, str]:
    """A verb in this process. Its outcome by exit code and stderr."""
    from typer.testing import CliRunner

    from solon.cli import app

    before = os.getcwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, line)
    finally:
        os.chdir(before)
    words = f"{line!r:.600} → {done.exit_code}: {done.stderr[-600:]!r}"
    if (
        "fault of Solon" in done.output
        or "Traceback" in done.output
        or not isinstance(done.exception, SystemExit | None)
    ):
        kept = re.search(r"traceback is in (\S+\.txt)", done.stderr)
        return "traceback", words + (Path(kept[1]).read_text() if kept else "")
    if (
        done.exit_code == 2
        and sum(not line.endswith(NOTES) for line in done.stderr.splitlines()) > 1
        and "records stand" not in done.stderr
        and "Usage" not in done.output
    ):
        return "long", words
    return ("said" if done.exit_code else "accepted"), words


def fuzz_model(rng: random.Random, folder: Path, tiny: str) -> tuple[str, str]:
    """A damaged copy of the tiny model, loaded and asked."""
    from solon.engines.base import ScoreRequest
    from solon.engines.local import LocalEngine
    from solon.records import user

    where = folder / "model"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(tiny, where)
    for _ in range(rng.choice((1, 1, 2))):
        damage_model(rng, where)

    def work() -> str:
        engine = LocalEngine.load(str(where), dtype="float32", system="s")
        (scores,) = engine.score([ScoreRequest("s", (user("A or B?"),), ("A", "B"), "(")])
        if not all(p is None or (math.isfinite(p) and p <= 1e-6) for p in scores.logprobs):
            return "unwritable"
        return "accepted"

    return outcome(work)


def damage_model(rng: random.Random, where: Path) -> None:
    paths = [p for p in sorted(where.iterdir()) if p.is_file()]
    path = rng.choice(paths) if paths else where / "config.json"
    act = rng.randrange(9)
    if act == 0:
        path.unlink(missing_ok=True)
    elif act == 1 and path.exists():
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif act == 2 and path.exists():
        data = bytearray(path.read_bytes() or b"x")
        for _ in range(rng.choice((1, 8))):
            data[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
        path.write_bytes(bytes(data))
    elif act == 3:
        names = [
            "pytorch_model.bin",
            "../../x.safetensors",
            "/etc/passwd",
            "nope.safetensors",
            3,
            None,
            "model.safetensors",
        ]
        (where / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": rng.choice(names)}})
        )
        if rng.random() < 0.5 and (where / "model.safetensors").exists():
            (where / "model.safetensors").rename(where / "model-1.safetensors")
    elif act == 4:
        path.write_text(
            rng.choice(["", "{", "[]", "null", "version https://git-lfs.github.com/spec/v1\n", '{"a": NaN}', "\xff"])
        )
    else:
        for name in rng.sample(["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"], 2):
            target = where / name
            try:
                value = json.loads(target.read_text())
            except (OSError, ValueError):
                continue
            if isinstance(value, dict) and value:
                key = rng.choice(list(value))
                numbers = [0, -1, 3, 7, 33, 64, 1_000, 2.5]
                value[key] = rng.choice([*[x for x in ODD if not has_half(x)], *numbers])
                target.write_text(json.dumps(value))


def fuzz_run(rng: random.Random, folder: Path, whole: Path, line: list[str]) -> tuple[str, str]:
    """A damaged run directory, reported on and run again."""
    where = folder / "run"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(whole, where)
    paths = [p for p in sorted(where.rglob("*")) if p.is_file() and p.suffix in (".json", ".jsonl", ".yaml", ".md")]
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(paths)
        data = path.read_bytes() if path.exists() else b""
        act = rng.randrange(5)
        if act == 0:
            path.unlink(missing_ok=True)
        elif act == 1:
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        elif act == 2:
            path.write_bytes(rng.choice([b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}\n", b'{"id": 3}\n', b"[" * 5000]))
        elif act == 3 and data:
            cut = rng.randrange(len(data))
            path.write_bytes(data[:cut] + rng.choice(RAW) + data[cut:])
        elif data:
            path.write_bytes(data + data)
    first = command(["report", str(where)], folder)
    if first[0] in BAD:
        return first
    result, words = command([*line[:2], "--out", str(where), *line[2:]], folder)
    if result == "accepted" and (gone := ids(whole) - ids(where)):
        return "lost", f"{len(gone)} records are gone and nothing was said: {sorted(gone)[:5]} … {words}"
    return result, words


def ids(run: Path) -> set[tuple[str, str]]:
    """(stage, id) of every record of a run."""
    return {(stage, row["id"]) for stage, rows in records(run).items() for row in rows}


RUN = ["run", "tiny", "--quiet", *(x for s in ("prompts.n_red_team=2", "prompts.n_helpful=2", "prompts.n_heldout=2", "ppo.updates=1",
       "human.n_comparisons=10", "human.n_demonstrations=4", "human.heldout_comparisons=4") for x in ("--set", s))]  # fmt: skip


def many(name: str, n: int, one: Callable[[random.Random], tuple[str, str]], seed: int) -> Counter[str]:
    """`one` for n seeds. Prints the counts and the first example of each fault."""
    counts: Counter[str] = Counter()
    for i in range(n):
        result, words = one(random.Random(f"{name}-{seed}-{i}"))
        counts[result] += 1
        if result in BAD and counts[result] <= 3:
            print(f"  {name} {i} {result}: {words[-2500:]}", flush=True)
    print(f"{name}: {n} made; " + ", ".join(f"{counts[k]} {k}" for k in ("accepted", "said", *BAD)), flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "recipes", "constitutions", "lines", "models", "runs", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    from solon.models.tiny import make_tiny_model

    with tempfile.TemporaryDirectory(prefix="solon-fuzz-") as name:
        folder = Path(name)
        tempfile.tempdir = name  # tracebacks go with it
        tiny = str(make_tiny_model(folder / "tiny")) if asked.lines or asked.models else ""
        total: Counter[str] = Counter()
        total += many("data", asked.data, lambda rng: fuzz_data(rng, folder), asked.seed)
        total += many("recipes", asked.recipes, lambda rng: fuzz_recipe(rng, folder), asked.seed)
        total += many("constitutions", asked.constitutions, lambda rng: fuzz_constitution(rng, folder), asked.seed)
        total += many("models", asked.models, lambda rng: fuzz_model(rng, folder, tiny), asked.seed)
        total += many("lines", asked.lines, lambda rng: fuzz_line(rng, folder, tiny), asked.seed)
        if asked.runs:
            whole = folder / "whole"
            print("a run to damage:", command([*RUN[:2], "--out", str(whole), *RUN[2:]], folder)[0])
            total += many("runs", asked.runs, lambda rng: fuzz_run(rng, folder, whole, RUN), asked.seed)
    return 1 if any(total[k] for k in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
