"""Runs every case of a folder of known faults (its README.md lists them) as command lines, and counts right and wrong.

    python -m benchmarks.cases ../shared/cases [--only WORD] [--keep DIR]

Each command runs in a process of its own, forked from this one so that libraries are imported once. A case is right where
its exit code, its words and what it wrote are as the folder's README asks, with no traceback and no fault of Solon. Fault
servers of that folder (fake.py, srv.py) run on 127.0.0.1 and end with this program.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 240  # of one command
MEMORY_MB = 6000  # peak of one command
ALL = re.compile(r"")


@dataclass
class Done:
    code: int
    out: str
    err: str
    seconds: float
    megabytes: float


@dataclass
class Case:
    """One command line and what is right. says: a pattern of stderr. then: looks at what was written; "" where right."""

    row: str
    args: list[str]
    codes: tuple[int, ...]
    says: str = ""
    then: Callable[[Done], str] = lambda done: ""
    env: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None


def command(args: list[str], env: dict[str, str], folder: Path) -> Done:
    """Run `solon ARGS` in a forked process."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(env)
        code = 70
        try:
            from solon.cli import app

            app(args, standalone_mode=True)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() - began > LIMIT_S:
            os.kill(child, 9)
            _, status, used = os.wait4(child, 0)
            break
        time.sleep(0.02)
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Done(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - began, used.ru_maxrss / 1024)


def judge(case: Case, done: Done) -> str:
    """What is wrong; "" where the case is right."""
    for word in ("Traceback", "fault of Solon"):
        if word in done.err + done.out:
            return word
    if done.code not in case.codes:
        return f"exit {done.code}, expected {' or '.join(map(str, case.codes))}: {done.err.strip()[-200:]!r}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.err + done.out):
        return "control characters reached the terminal"
    if done.code == 2 and done.err.strip().count("\n") > 2:
        return f"more than a line: {done.err.strip()[-300:]!r}"
    if not re.search(case.says, done.err + done.out, re.S | re.I):
        return f"does not say {case.says!r}: {done.err.strip()[-300:]!r}"
    if done.megabytes > MEMORY_MB:
        return f"{done.megabytes:.0f} MB"
    return case.then(done)


@contextmanager
def server(script: Path, *more: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(script), str(port), *more], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class Cases:
    """The cases of the folder, in the order of its README."""

    def __init__(self, given: Path, work: Path, fake: str, srv: str) -> None:
        self.given, self.work, self.fake, self.srv = given, work, fake, srv
        self.models = work / "models"
        self.tiny = str(self.models / "tiny")
        self.n = 0

    def f(self, name: str) -> str:
        return str(self.given / name)

    def out(self, suffix: str = ".jsonl") -> Path:
        self.n += 1
        return self.work / f"out{self.n}{suffix}"

    def label(self, pairs: str, out: Path, model: str = "", *more: str) -> list[str]:
        return ["label", "--pairs", pairs, "--out", str(out), "--model", model or self.tiny, "--principles", "1",
                "--dtype", "float32", "--quiet", *more]  # fmt: skip

    def critique(self, prompts: str, out: Path, model: str = "", *more: str) -> list[str]:
        return ["critique", "--prompts", prompts, "--out", str(out), "--model", model or self.tiny, "--revisions", "1",
                "--max-tokens", "8", "--dtype", "float32", "--quiet", *more]  # fmt: skip

    def training(self, verb: str, data: str, out: Path) -> list[str]:
        option = {"sft": "--data", "ppo": "--prompts"}.get(verb, "--comparisons")
        more = ["--reward-model", str(self.work / "rm"), "--updates", "1", "--rollouts", "2", "--max-tokens", "4",
                "--set", "minibatch=2", "--limit", "2"] if verb == "ppo" else ["--limit", "8"]  # fmt: skip
        return [verb, option, data, "--out", str(out), "--model", self.tiny, "--dtype", "float32", "--quiet", *more]

    def all(self) -> Iterator[Case]:
        yield from self.destroyed()
        yield from self.own_files()
        yield from self.abstentions()
        yield from self.identities()
        yield from self.bad_models()
        yield from self.labels()
        yield from self.conversations()
        yield from self.lengths()
        yield from self.endpoints()
        yield from self.bad_lines()
        yield from self.recipes()
        yield from self.runs()

    def destroyed(self) -> Iterator[Case]:
        data = {"sft": "solon:demonstrations-harmless", "ppo": "solon:helpful"}
        yield Case(
            "(a reward model for the others)",
            self.training("reward-model", "solon:comparisons-harmless", self.work / "rm"),
            (0,),
        )
        for verb in ("sft", "feedback-model", "reward-model", "ppo"):
            full = self.work / f"thesis-{verb}"
            full.mkdir()
            (full / "thesis.tex").write_text("years of work")
            kept = lambda done, full=full: "" if (full / "thesis.tex").is_file() else "the thesis is gone"  # noqa: E731
            yield Case("a directory with files as --out", self.training(verb, data.get(verb, "solon:comparisons-harmless"), full),
                       (2,), then=kept)  # fmt: skip

    def own_files(self) -> Iterator[Case]:
        for verb in ("label", "critique"):
            one = Path(shutil.copy(self.f("one.jsonl"), self.out()))
            data = one.read_bytes()
            same = lambda done, one=one, data=data: "" if one.read_bytes() == data else "the file was changed"  # noqa: E731
            make = self.label if verb == "label" else self.critique
            yield Case(
                "one.jsonl as --out",
                make(self.f("ok4.jsonl" if verb == "label" else "prompts4.jsonl"), one),
                (2,),
                then=same,
            )
            yield Case("one.jsonl as --out and input", make(str(one), one), (2,), then=same)

    def abstentions(self) -> Iterator[Case]:
        out = self.out()
        for _ in range(2):
            yield Case("abstains.yaml, labelled twice", self.label(self.f("ok4.jsonl"), out, "", "--constitution", self.f("abstains.yaml")),
                       (0, 1), env={"SOLON_ALLOW_CHECKS": "1"},
                       then=lambda done, out=out: "" if len(rows(out)) in (0, 4) else f"{len(rows(out))} records")  # fmt: skip
        some = self.f("labels_with_one_abstention.jsonl")
        yield Case("one abstention", self.training("reward-model", some, self.out("")), (0,))
        yield Case("one abstention", self.training("feedback-model", some, self.out("")), (0, 2), "labels?")
        yield Case(
            "one abstention",
            ["evaluate", "--suite", "hhh", "--file", some, "--model", self.tiny, "--dtype", "float32"],
            (0, 2),
        )
        yield Case("one abstention", self.label(self.f("ok4.jsonl"), self.out(), "", "--examples", some), (0,))
        yield Case(
            "a run with server:half",
            self.run(
                self.work / "half", "--set", "feedback.warmup=null", "--set", f"feedback.judge=server:half@{self.fake}"
            ),
            (0, 1),
        )
        yield Case(
            "a run with server:half, again",
            self.run(
                self.work / "half", "--set", "feedback.warmup=null", "--set", f"feedback.judge=server:half@{self.fake}"
            ),
            (0, 1),
        )

    def run(self, out: Path, *more: str) -> list[str]:
        small = ["prompts.n_red_team=3", "prompts.n_helpful=3", "prompts.n_heldout=2", "ppo.updates=1", "human.n_comparisons=12",
                 "human.n_demonstrations=6", "human.heldout_comparisons=4"]  # fmt: skip
        return ["run", "tiny", "--out", str(out), "--quiet", *(x for s in small for x in ("--set", s)), *more]

    def identities(self) -> Iterator[Case]:
        out = self.out()
        four = lambda done: "" if len(rows(out)) == 4 else f"{len(rows(out))} records"  # noqa: E731
        yield Case("ok4.jsonl", self.label(self.f("ok4.jsonl"), out), (0,), then=four)
        for more in (["--hard"], ["--seed", "5"], ["--constitution", "simple"]):
            yield Case(
                f"ok4.jsonl again with {more[0]}", self.label(self.f("ok4.jsonl"), out, "", *more), (2,), then=four
            )
        yield Case(
            "ok4.jsonl again with another model",
            self.label(self.f("ok4.jsonl"), out, str(self.models / "gpt2")),
            (2,),
            then=four,
        )

    def bad_models(self) -> Iterator[Case]:
        for name in ("prefix", "missingtensor"):
            yield Case(
                f"model {name}",
                self.label(self.f("one.jsonl"), self.out(), str(self.models / name)),
                (2,),
                "q_proj|tensor|missing|weight",
            )
        for name in ("lfs", "truncated", "badconfig", "unknown", "notokenizer"):
            yield Case(f"model {name}", self.label(self.f("one.jsonl"), self.out(), str(self.models / name)), (2,))
        yield Case("a reward model without score.weight", ["score", "--reward-model", str(self.work / "headless"), "--input",
                   self.f("one.jsonl"), "--out", str(self.out())], (2,), before=self.headless)  # fmt: skip
        for name, entry in (("bin", "pytorch_model.bin"), ("up", "../../secret.safetensors")):
            where = Path(shutil.copytree(self.tiny, self.models / f"index-{name}"))
            weights = where / "model.safetensors"
            (where / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": entry}})
            )
            weights.rename(where / "model-00001-of-00001.safetensors")
            yield Case(f"an index that names {entry}", self.label(self.f("one.jsonl"), self.out(), str(where)), (2,))
        for name in ("gemma", "spm", "dropsys"):
            model = str(self.models / name)
            yield Case(f"model {name}", self.label(self.f("ok4.jsonl"), out := self.out(), model), (0,),
                       then=lambda done, out=out: "" if any(r["label"] is not None for r in rows(out)) else "no label")  # fmt: skip
            yield Case(f"model {name}", self.critique(self.f("prompts4.jsonl"), self.out(), model), (0,))

    def headless(self) -> None:
        from safetensors.torch import load_file, save_file

        where = Path(shutil.copytree(self.work / "rm", self.work / "headless", dirs_exist_ok=True))
        for path in where.glob("*.safetensors"):
            kept = {k: v for k, v in load_file(path).items() if "score" not in k}
            save_file(kept, path, metadata={"format": "pt"})

    def labels(self) -> Iterator[Case]:
        for name in ("label_nan.jsonl", "label_score.jsonl", "comparisons-label-2.jsonl"):
            for verb in ("reward-model", "feedback-model"):
                yield Case(name, self.training(verb, self.f(name), self.out("")), (2,), r"\.jsonl:\d+: ")
            yield Case(
                name,
                ["score", "--reward-model", str(self.work / "rm"), "--input", self.f(name), "--out", str(self.out())],
                (2,),
            )
        yield Case(
            "ppo.learning_rate=.inf", self.run(self.work / "inf", "--set", "ppo.learning_rate=.inf"), (2,), "finite"
        )

    def conversations(self) -> Iterator[Case]:
        out = self.out()
        yield Case("multi_lost.jsonl", self.label(self.f("multi_lost.jsonl"), out), (0,),
                   then=lambda done: "" if [len(r["prompt"]) for r in rows(out)] == [3] else "turns were lost")  # fmt: skip
        for name in ("ends_user.jsonl", "chosen_empty_list.jsonl", "comparisons-chosen-empty-list.jsonl"):
            yield Case(name, self.label(self.f(name), self.out()), (2,), r"\.jsonl:\d+: ")
            yield Case(name, self.training("reward-model", self.f(name), self.out("")), (2,), r"\.jsonl:\d+: ")
        for name, count in (
            ("rewardbench.jsonl", 1),
            ("dup.jsonl", 1),
            ("hh_sameprompt.jsonl", 2),
            ("source.jsonl", 1),
        ):
            if name == "source.jsonl":
                path = self.work / name
                path.write_text(
                    json.dumps({"source": "sharegpt", "prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"
                )
            else:
                path = self.given / name
            out2 = self.out()
            yield Case(name, self.label(str(path), out2), (0,), then=lambda done, out=out2, n=count:
                       "" if len(rows(out)) == n else f"{len(rows(out))} records")  # fmt: skip
        yield Case("hh_sameprompt.jsonl", self.critique(self.f("hh_sameprompt.jsonl"), self.out()), (0,))
        yield Case(
            "hh_sameprompt.jsonl",
            ["evaluate", "--suite", "hhh", "--file", self.f("hh_sameprompt.jsonl"), "--model", self.tiny],
            (0,),
        )

    def lengths(self) -> Iterator[Case]:
        yield Case(
            "some_long.jsonl", self.critique(self.f("some_long.jsonl"), self.out()), (0,), "too long|tokens|left out"
        )
        yield Case("long_prompt.jsonl", self.critique(self.f("long_prompt.jsonl"), self.out()), (1,), "token|too long")
        huge = self.work / "huge.jsonl"
        huge.write_text(json.dumps({"prompt": "word " * 200_000}) + "\n")
        yield Case("a 1 MB prompt", self.critique(str(huge), self.out()), (1,), "token|too long|character")
        pair = self.work / "hugepair.jsonl"
        pair.write_text(json.dumps({"prompt": "q", "chosen": "word " * 200_000, "rejected": "no"}) + "\n")
        yield Case("a 1 MB response", self.label(str(pair), self.out()), (1,), "token|too long|character|abst")
        yield Case(
            "sft_long.jsonl",
            self.training("sft", self.f("sft_long.jsonl"), self.out("")),
            (0,),
            "left out|longer|too long",
        )
        yield Case("sft_alllong.jsonl", self.training("sft", self.f("sft_alllong.jsonl"), self.out("")), (2,))

    def endpoints(self) -> Iterator[Case]:
        env = {"SOLON_TIMEOUT": "3"}
        # die2 answers two requests, and a chain needs more
        none = ("gpt5", "ctx", "err200", "sse", "empty", "nullcontent", "toolcall", "die2")
        for mode in (*none, "parts", "surr", "ctx-some", "think", "good"):
            out = self.out()
            codes = (1,) if mode in none else (0,)

            def chains(done: Done, out: Path = out, mode: str = mode, none: tuple[str, ...] = none) -> str:
                found = rows(out)
                if mode in none:
                    return f"{len(found)} chains" if found else ""
                return "reasoning in a chain" if "<think>" in json.dumps(found) else "" if found else "no chain"

            yield Case(f"critique with server:{mode}", self.critique(self.f("prompts4.jsonl"), out, f"server:{mode}@{self.fake}"),
                       codes, then=chains, env=env)  # fmt: skip
        for mode, labelled in {"max5": 4, "gpt5": 0, "err200": 0, "meta": 4, "bpe": 4, "close": 0, "think": 0, "nullcontent": 0,
                               "toolcall": 0, "nologprobs": 0, "good": 4, "lie": 0}.items():  # fmt: skip
            out = self.out()
            yield Case(f"label with server:{mode}", self.label(self.f("ok4.jsonl"), out, f"server:{mode}@{self.fake}"),
                       (0,) if labelled else (1,), env=env,
                       then=lambda done, out=out, n=labelled: "" if (got := sum(r["label"] is not None for r in rows(out))) == n
                       else f"{got} labels, expected {n}")  # fmt: skip
        for mode in (
            "slow",
            "slowhead",
            "gzbomb",
            "huge+300",
            "poslogprob",
            "hugelogprob",
            "nanlogprob",
            "deep",
            "garbage",
        ):
            yield Case(
                f"label with server:{mode}",
                self.label(self.f("one.jsonl"), self.out(), f"server:{mode}@{self.srv}"),
                (1, 2),
                env=env,
            )
        yield Case("a key and two endpoints", self.run(self.work / "keys", "--set", "feedback.warmup=null", "--set", f"feedback.judge=server:ok@{self.srv}", "--set",
                   f"gold.judge=server:good@{self.fake}"), (2,), "one host", env={"SOLON_API_KEY": "sk-canary-123456"})  # fmt: skip

    def bad_lines(self) -> Iterator[Case]:
        line = r"(\.jsonl|\.gz):\d+: "
        for name in (
            "prompts-deep.jsonl",
            "prompts-surrogate.jsonl",
            "prompts-duplicate-id-escape.jsonl",
            "trunc.jsonl.gz",
        ):
            yield Case(name, self.critique(self.f(name), self.out()), (2,), line)
        for name in ("surr.jsonl", "trunc.jsonl.gz"):
            yield Case(name, self.label(self.f(name), self.out()), (2,), line)
        for name in ("demonstrations-train-turns.jsonl", "contentnull.jsonl"):
            yield Case(name, self.training("sft", self.f(name), self.out("")), (2,), line)
            yield Case(
                name,
                ["score", "--reward-model", str(self.work / "rm"), "--input", self.f(name), "--out", str(self.out())],
                (2,),
                line,
            )

    def recipes(self) -> Iterator[Case]:
        for path in sorted(self.given.glob("recipe-*.yaml")):
            codes = (0, 2) if "date" in path.name else (2,)
            yield Case(path.name, ["recipes", "validate", str(path)], codes, "" if 0 in codes else r"\.yaml:\d+: ")
            if 0 not in codes:
                yield Case(path.name, ["run", str(path), "--out", str(self.work / path.stem)], (2,), r"\.yaml:\d+: ")

    def runs(self) -> Iterator[Case]:
        whole = self.work / "whole"
        yield Case("(a run to damage)", self.run(whole), (0,))
        damages: dict[str, Callable[[Path], None]] = {
            "records deleted": lambda d: next(d.glob("*/records.jsonl")).unlink(),
            "records cut": lambda d: next(d.glob("*/records.jsonl")).write_bytes(b""),
            "stage.json damaged": lambda d: next(d.glob("*/stage.json")).write_text("{"),
            "stage.json a list": lambda d: next(d.glob("*/stage.json")).write_text("[]"),
            "report.json damaged": lambda d: (d / "report.json").write_text("{"),
        }
        for name, damage in damages.items():
            where = self.work / f"run-{name.replace(' ', '-')}"

            def make(where: Path = where, damage: Callable[[Path], None] = damage) -> None:
                shutil.copytree(whole, where)
                damage(where)

            yield Case(f"a run: {name}", self.run(where), (0, 1, 2), before=make)
            yield Case(f"a report: {name}", ["report", str(where)], (0, 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="only cases whose name or command holds this word")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    asked = parser.parse_args()
    if not (asked.folder / "README.md").is_file():
        print(f"{asked.folder}: no cases here (the folder is no part of the project); nothing was run")
        return 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "COLUMNS": "200"}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work = asked.keep or Path(tempfile.mkdtemp(prefix="solon-cases-"))
    work.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, str(asked.folder / "make_models.py"), str(work / "models")], capture_output=True, check=False
    )
    bomb = work / "bomb.gz"
    bomb.write_bytes(gzip.compress(b" " * (300 << 20), 9))
    importlib.import_module("solon.cli")  # first: it silences the libraries
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    wrong, right = [], 0
    with (
        server(asked.folder / "fake.py") as fake,
        server(asked.folder / "srv.py", str(work / "srv.log"), str(bomb)) as srv,
    ):
        for case in Cases(asked.folder, work, fake, srv).all():
            if asked.only and asked.only not in f"{case.row} {' '.join(case.args)}" and not case.row.startswith("("):
                continue
            case.before()
            done = command(case.args, case.env, work)
            if why := judge(case, done):
                wrong.append(case)
                print(f"WRONG {case.args[0]} · {case.row}: {why}", flush=True)
            else:
                right += 1
                print(f"right {case.args[0]} · {case.row} ({done.seconds:.1f} s)", flush=True)
    print(f"{right} right, {len(wrong)} wrong")
    if not asked.keep:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
