"""Runs that are killed at random instants, and resumed until they are done, beside one that nothing disturbed.

The model is the tiny one; the judge is an endpoint whose server, in this process, fails often and answers some questions
with neither option. SIGKILL, and now and then Ctrl-C, at random instants. In the end the records of every stage and the weights of
every model must be those of the undisturbed run, and the ledger must hold every request that the server counted: never fewer,
and at most those more that were on their way when a kill came. The key that the server is sent stands in no file of a run.

    python -m benchmarks.kills --kills 60 --out benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "sk-canary-41c7"  # sent to the judge's server; must stand in no file of a run
CONNECTIONS = 8  # requests at once, as `Endpoint` has it
SETTINGS: dict[str, Any] = {
    "model": "tiny-random", "constitution": "simple", "dtype": "float32", "batch_size": 4,
    "adapter": {"rank": 2, "alpha": 4}, "prompts.n_red_team": 6, "prompts.n_helpful": 6, "prompts.n_heldout": 3,
    "human.n_demonstrations": 6, "human.n_comparisons": 16, "human.heldout_comparisons": 6,
    "supervised.sampling": {"max_tokens": 12}, "supervised.train": {"epochs": 1}, "warmup.train": {"epochs": 1},
    "feedback.warmup": None, "feedback.sampling": {"max_tokens": 8}, "reward_model.train": {"epochs": 1},
    "ppo": {"updates": 3, "rollouts": 4, "epochs": 1, "minibatch": 2, "max_tokens": 6, "check_every": 1},
    "gold.probes": 2, "evaluation": {"sampling": {"max_tokens": 6}, "judge_comparisons": 4},
}  # fmt: skip
# Without the stages before the judge's: for a test.
SHORT = {k: v for k, v in SETTINGS.items() if not k.startswith(("human.", "supervised.", "warmup."))}


class Judge:
    """The server: `count` is what it was asked, whatever it answered."""

    def __init__(self, seed: int, failures: float) -> None:
        self.count, self.failures, self._rng, self._lock = 0, failures, random.Random(seed), threading.Lock()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.count += 1
            if self._rng.random() < self.failures:
                return self._rng.choice((429, 500, 503)), {"error": {"message": "not now"}}
        text = json.dumps(body["messages"], sort_keys=True)
        drawn = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        a, b = math.log(0.05 + 0.9 * (drawn % 997) / 997), math.log(0.95 - 0.9 * (drawn % 997) / 997)
        first = "I" if drawn % 11 == 0 else "A"  # one in eleven is answered with neither option
        top = [{"token": "I", "logprob": -0.01}] if first == "I" else [
            {"token": "A", "logprob": a}, {"token": "B", "logprob": b}
        ]  # fmt: skip
        shown = {"content": [{"token": first, "logprob": top[0]["logprob"], "top_logprobs": top}]}
        choice = {"finish_reason": "length", "message": {"role": "assistant", "content": first}, "logprobs": shown}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


@contextmanager
def served(judge: Judge) -> Iterator[str]:
    """The address of a server on this machine that answers as the judge does."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            code, value = judge.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            data = json.dumps(value).encode()
            try:
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # whoever asked was killed
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a connection that a kill cut

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def _work(recipe: str, settings: dict[str, Any], out: Path) -> None:
    import torch

    from solon.errors import Outage
    from solon.recipes.recipe import load_recipe
    from solon.report.run import run_recipe

    torch.set_num_threads(1)
    os.environ["SOLON_API_KEY"] = KEY
    try:
        run_recipe(load_recipe(recipe, settings), out, quiet=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except Outage:
        sys.exit(1)


def _start(recipe: str, settings: dict[str, Any], out: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["solon.recipes.pipeline", "trl", "peft", "datasets", "solon.engines.local"])
    process = context.Process(target=_work, args=(recipe, settings, out))
    process.start()
    return process


def _finish(recipe: str, settings: dict[str, Any], out: Path) -> None:
    """Start again until the run is done: an outage of the judge ends a start with 1."""
    for _ in range(20):
        process = _start(recipe, settings, out)
        process.join(600)
        if process.exitcode == 0:
            return
        if process.exitcode != 1:
            break
    raise RuntimeError(f"{out}: ended with {process.exitcode}")


def records(out: Path) -> dict[str, list[Any]]:
    """Every journal of a run, by stage, in order; the path of the run itself taken out."""
    found = {}
    for path in sorted(out.glob("*/records.jsonl")):
        rows = [json.loads(line.replace(str(out), "OUT")) for line in path.read_bytes().decode().split("\n") if line]
        found[path.parent.name] = sorted(rows, key=lambda r: r["id"])
    return found


def weights(out: Path) -> dict[str, str]:
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((out / "models").rglob("*.safetensors"))
    }


def leaks(out: Path) -> list[str]:
    """The files of a run that hold the judge's key."""
    files = (p for p in out.rglob("*") if p.is_file())
    return [p.relative_to(out).as_posix() for p in files if KEY.encode() in p.read_bytes()]


def ledger(out: Path) -> int:
    """Requests to the judge's endpoint, as the stages tell them: those of stages that the judge alone worked for."""
    stages = [*out.glob("choices/stage.json"), *out.glob("comparisons/stage.json"), *out.glob("ppo/stage.json")]
    stages += [*out.glob("judge-heldout/stage.json"), *out.glob("judging-*/stage.json")]
    found = 0
    for path in stages:
        found += json.loads(path.read_text())["requests"]
    return found


def interrupted(
    kills: int, seed: int = 0, *, failures: float = 0.25, most: int = 12, short: bool = False
) -> dict[str, Any]:
    """Interrupt runs `kills` times in all, each at most `most` times; finish each; what differs from the undisturbed one."""
    rng, judge = random.Random(seed), Judge(seed, failures)
    found: dict[str, Any] = {"kills": 0, "ctrl_c": 0, "runs": 0, "different": [], "ledger": []}
    with tempfile.TemporaryDirectory() as name, served(judge) as url:
        settings = {**(SHORT if short else SETTINGS), "feedback.judge": f"server:judge@{url}"}
        recipe, folder = "rlaif" if short else "hybrid", Path(name)
        _finish(recipe, settings, folder / "warm")  # the forkserver's imports are no part of the time
        began, before = time.monotonic(), judge.count
        _finish(recipe, settings, folder / "whole")
        lasts = time.monotonic() - began
        found["undisturbed"] = {
            "seconds": round(lasts, 1),
            "asked": judge.count - before,
            "told": ledger(folder / "whole"),
        }
        expected = records(folder / "whole"), weights(folder / "whole")
        while found["kills"] + found["ctrl_c"] < kills:
            out, before, hits = folder / f"run-{found['runs']}", judge.count, 0
            while hits < most and found["kills"] + found["ctrl_c"] < kills:
                process = _start(recipe, settings, out)
                process.join(rng.uniform(0.02, lasts / 3))
                if process.exitcode is not None:
                    break
                soft = rng.random() < 0.25
                os.kill(process.pid, signal.SIGINT if soft else signal.SIGKILL)
                process.join(60)
                if process.exitcode == 0:
                    break
                found["ctrl_c" if soft else "kills"] += 1
                hits += 1
            _finish(recipe, settings, out)
            found["runs"] += 1
            asked, told = judge.count - before, ledger(out)
            found["ledger"].append({"interruptions": hits, "asked": asked, "told": told})
            same, leaked = (records(out) == expected[0], weights(out) == expected[1]), leaks(out)
            if same != (True, True) or leaked or not asked <= told <= asked + CONNECTIONS * hits:
                found["different"].append(
                    {"run": out.name, "records": same[0], "weights": same[1], "leaks": leaked, "asked": asked, "told": told}
                )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=float, default=0.25, help="share of requests that the server fails")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = {**interrupted(given.kills, given.seed, failures=given.failures), "machine": platform.machine()}
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    sys.exit(1 if found["different"] else 0)


if __name__ == "__main__":
    main()
