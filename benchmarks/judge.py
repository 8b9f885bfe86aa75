"""Judging pairs under K principles in both orders: Solon beside what a user would otherwise write or install.

    python -m benchmarks.judge [--pairs 64] [--parts 8] [--principles 16 1] [--against plain decision distilabel]

Same weights, same threads, same dtype; against the plain loop also the same tokens, and before anything is timed its
log-odds and Solon's are compared. transformers' pipeline words the same questions its own way. distilabel's judge has
one question of its own, asks it in one order, writes a rationale and parses a rating: there a pair is a pair.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import keep, median_ratio, peak_mb, product_rate, reference_data, said, seconds
from solon.constitution import load_constitution
from solon.data import read_pairs
from solon.engines.base import ScoreRequest
from solon.engines.decision import typed
from solon.engines.local import LocalEngine
from solon.feedback.questions import OPTIONS, PREFIX, comparison_chat, comparison_question, conversation
from solon.models.plain import left_pad
from solon.models.weights import device, load_tokenizer, resolve, resolve_dtype
from solon.records import Pair

BATCH = 8
Judge = Callable[[Sequence[ScoreRequest]], list[float]]


def requests(pairs: Sequence[Pair], principles: int) -> list[ScoreRequest]:
    made = []
    for pair in pairs:
        for n, principle in enumerate(load_constitution("solon").principles[:principles]):
            for order, (a, b) in (("forward", pair.responses), ("swapped", pair.responses[::-1])):
                chat = comparison_chat(pair.prompt, a, b, principle.comparison)
                typed = comparison_question(pair.prompt, a, b, principle.comparison)
                made.append(ScoreRequest(f"{pair.id}/{n}/{order}", chat, OPTIONS, PREFIX, question=typed))
    return made


def solon(engine: LocalEngine) -> Judge:
    def judge(asked: Sequence[ScoreRequest]) -> list[float]:
        found = {s.id: s.logprobs for s in engine.score(asked)}
        return [found[r.id][0] - found[r.id][1] for r in asked]  # type: ignore[operator]

    return judge


def plain(engine: LocalEngine, dtype: str) -> Judge:
    """What one writes by hand: batches of 8 full prompts, padded on the left, the last position's logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve("smollm2"), dtype=resolve_dtype(dtype)).to(device()).eval()
    options = [engine.tokenizer(o, add_special_tokens=False)["input_ids"][0] for o in OPTIONS]

    @torch.no_grad()
    def judge(asked: Sequence[ScoreRequest]) -> list[float]:
        odds: list[float] = []
        for start in range(0, len(asked), BATCH):
            rows = [engine.ids(r.chat, r.prefix) for r in asked[start : start + BATCH]]
            ids, mask = left_pad(rows, engine.tokenizer.pad_token_id, model.device)
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            scores = logits.float().log_softmax(-1)[:, options]
            odds += (scores[:, 0] - scores[:, 1]).tolist()
        return odds

    return judge


def decision(dtype: str) -> Judge:
    """transformers' own pipeline("decision") on the same model, one request a pair with all its questions."""
    import math

    from transformers import AutoModelForCausalLM, pipeline

    where = resolve("smollm2")
    model = AutoModelForCausalLM.from_pretrained(where, dtype=resolve_dtype(dtype)).to(device())
    decide = pipeline("decision", model=model, tokenizer=load_tokenizer(where))

    def judge(asked: Sequence[ScoreRequest]) -> list[float]:
        by_pair: dict[str, list[ScoreRequest]] = {}
        for r in asked:
            by_pair.setdefault(r.id.rsplit("/", 2)[0], []).append(r)
        found: dict[str, float] = {}
        for same in by_pair.values():
            questions = {r.id: typed(r.question, OPTIONS) for r in same}  # type: ignore[arg-type]
            answers = decide({"state": same[0].question.state, "questions": questions})  # type: ignore[union-attr]
            for name, answer in answers.items():
                p = answer["probabilities"]
                found[name] = math.log(p["A"]) - math.log(p["B"])
        return [found[r.id] for r in asked]

    return judge


def least_flops(engine: LocalEngine, asked: Sequence[ScoreRequest]) -> dict[str, float]:
    """FLOPs of the matrix products that any judge must do: each distinct beginning of the requests once.

    weights: of the blocks, two a weight and token. attention: of each token with what it sees. What the last block and
    the output head do at the places that are read is left out (under 1 %), as is all that is no matrix product.
    """
    config = engine.model.config.get_text_config()
    named = [(n, p) for n, p in engine.model.named_parameters() if ".layers." in n and p.dim() == 2]
    last = f".layers.{config.num_hidden_layers - 1}."
    # of the last block only the keys and values are needed, but at the places read
    weight = sum(2 * p.numel() for n, p in named if last not in n or ".k_proj" in n or ".v_proj" in n)
    seen = 4 * config.num_attention_heads * config.head_dim * (config.num_hidden_layers - 1)  # a token and one it sees
    tokens = places = 0
    before: list[int] = []
    for row in sorted(engine.ids(r.chat, r.prefix) for r in asked):
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), min(len(before), len(row))
        )
        tokens += len(row) - shared
        places += (len(row) * (len(row) + 1) - shared * (shared + 1)) // 2
        before = row
    return {"tokens": tokens, "weights": float(weight * tokens), "attention": float(seen * places)}


def one(name: str, pairs: int, principles: int, dtype: str) -> None:
    """In a process of its own: the peak memory of one side."""
    engine = LocalEngine.load("smollm2", dtype=dtype)
    judge = {"solon": lambda: solon(engine), "plain": lambda: plain(engine, dtype), "decision": lambda: decision(dtype)}
    asked = requests(load_pairs(pairs), principles)
    if name != "solon":
        engine.close()  # its tokenizer stays
    judge[name]()(asked)
    print(json.dumps({"peak_mb": peak_mb()}))


def peak_memory(name: str, pairs: int, principles: int, dtype: str) -> float:
    command = [sys.executable, "-m", "benchmarks.judge", "--only", name, "--pairs", str(pairs), "--dtype", dtype]
    done = subprocess.run([*command, "--principles", str(principles)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


class Distilabel:
    """Its judge in its own environment, which a pip of its own made; fed through pipes."""

    def __init__(self, python: str) -> None:
        worker = str(Path(__file__).with_name("distilabel_worker.py"))
        command = [python, worker, resolve("smollm2"), str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("distilabel's process ended; its error stands above")

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        assert self.process.stdin is not None
        rows = [[conversation(p.prompt), *p.responses] for p in pairs]
        self.process.stdin.write(json.dumps(rows) + "\n")
        self.process.stdin.flush()
        return self.read()


def against_distilabel(pairs: list[Pair], parts: int, python: str) -> dict[str, Any]:
    """Seconds a pair, Solon asking one principle in both orders."""
    engine = LocalEngine.load("smollm2", dtype="float32")
    ours, theirs = solon(engine), Distilabel(python)
    ours(requests(pairs[:2], 1))
    theirs(pairs[:1])
    size, rows = len(pairs) // parts, []
    mine = peak_memory("solon", size, 1, "float32")
    for n in range(parts):
        part = pairs[n * size : (n + 1) * size]
        if n % 2:
            peer = theirs(part)
            ours_s, _ = seconds(lambda part=part: ours(requests(part, 1)))
        else:
            ours_s, _ = seconds(lambda part=part: ours(requests(part, 1)))
            peer = theirs(part)
        rows.append({
            "ours_s": ours_s, "peer_s": peer["seconds"], "ratio": peer["seconds"] / ours_s, "answered": peer["answered"]
        })  # fmt: skip
        print(f"  part {n + 1}/{parts}: distilabel {peer['seconds']:.1f} s, {peer['answered']} of {size} parsed; "
              f"solon {ours_s:.1f} s", file=sys.stderr)  # fmt: skip
    return {
        "peer": "distilabel", "principles": 1, "pairs": size * parts, "dtype": "float32",
        "ratio": median_ratio([r["ratio"] for r in rows]), "answered": sum(r["answered"] for r in rows) / size / parts,
        "peak_mb": {"solon": mine, "distilabel": peer["peak_mb"], "ratio": mine / peer["peak_mb"]}, "rows": rows,
    }  # fmt: skip


def load_pairs(n: int) -> list[Pair]:
    found = read_pairs(str(reference_data() / "hh-harmless-dev.jsonl.gz"))
    return random.Random(0).sample(found, n)


def compare(peer: str, pairs: list[Pair], parts: int, principles: int, dtype: str) -> dict[str, Any]:
    engine = LocalEngine.load("smollm2", dtype=dtype)
    ours, theirs = solon(engine), plain(engine, dtype) if peer == "plain" else decision(dtype)
    first = requests(pairs[:2], principles)[:64]
    mine, other = ours(first), theirs(first)  # also warms both up
    apart = max(abs(a - b) for a, b in zip(mine, other, strict=True)) if peer == "plain" else None
    if apart is not None and dtype == "float32" and apart > 1e-3:
        raise SystemExit(f"not the same labels: log-odds differ by {apart}")
    assert engine._tree is not None
    size = len(pairs) // parts
    rows = []
    for n in range(parts):
        asked = requests(pairs[n * size : (n + 1) * size], principles)
        engine._tree._beginning = None  # what all requests begin with is computed in every part anew
        before = engine._tree.computed
        rates = [product_rate(resolve_dtype(dtype), str(device()))]
        sides = [lambda asked=asked: ours(asked), lambda asked=asked: theirs(asked)]
        took = [0.0, 0.0]
        for side in (1, 0) if n % 2 else (0, 1):
            took[side], _ = seconds(sides[side])
            if side == 0:
                rates.append(product_rate(resolve_dtype(dtype), str(device())))
        (ours_s, peer_s), rate = took, max(rates)
        computed = engine._tree.computed - before
        full = sum(len(engine.ids(r.chat, r.prefix)) for r in asked)
        least = least_flops(engine, asked)
        limit = (least["weights"] + least["attention"]) / rate
        rows.append({
            "ours_s": ours_s, "peer_s": peer_s, "ratio": peer_s / ours_s, "computed_tokens": computed,
            "full_tokens": full, "least_tokens": least["tokens"], "limit_s": limit, "of_limit": limit / ours_s,
            "of_limit_weights_only": least["weights"] / rate / ours_s, "product_gflops": rate / 1e9,
        })  # fmt: skip
        print(f"  part {n + 1}/{parts}: {peer} {peer_s:.1f} s, solon {ours_s:.1f} s, ratio {peer_s / ours_s:.2f}, "
              f"{rows[-1]['of_limit']:.0%} of the limit", file=sys.stderr)  # fmt: skip
    return {
        "peer": peer, "principles": principles, "pairs": size * parts, "dtype": dtype, "log_odds_apart": apart,
        "ratio": median_ratio([r["ratio"] for r in rows]), "of_limit": median_ratio([r["of_limit"] for r in rows]),
        "of_limit_weights_only": median_ratio([r["of_limit_weights_only"] for r in rows]),
        "tokens_saved": statistics.median([r["full_tokens"] / r["computed_tokens"] for r in rows]), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--principles", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--against", nargs="+", default=["plain", "decision", "distilabel"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory-pairs", type=int, default=4, help="pairs judged for the peak memory; 0: not measured")
    parser.add_argument("--distilabel", default=".venv-distilabel/bin/python", help="its environment's python")
    parser.add_argument("--name", default="judge", help="of the JSON file in benchmarks/results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        one(given.only, given.pairs, given.principles[0], given.dtype)
        return
    if not (reference_data() / "hh-harmless-dev.jsonl.gz").is_file():
        raise SystemExit(f"no reference data at {reference_data()}; set SOLON_REFERENCE_DATA")
    pairs = load_pairs(given.pairs)
    found = []
    for peer in given.against:
        if peer == "distilabel":
            if not Path(given.distilabel).exists():
                print(f"distilabel: not measured, no {given.distilabel} (make bench makes it)")
                continue
            found.append(result := against_distilabel(pairs, given.parts, given.distilabel))
            print(f"distilabel, a pair: {said(result['ratio'])}; it gave both ratings for {result['answered']:.0%} of "
                  f"the pairs; memory {result['peak_mb']['ratio']:.2f} of its")  # fmt: skip
            keep(given.name, {"judging": found})
            continue
        for principles in given.principles:
            result = compare(peer, pairs, given.parts, principles, given.dtype)
            if given.memory_pairs:
                mine, other = (peak_memory(n, given.memory_pairs, principles, given.dtype) for n in ("solon", peer))
                result["peak_mb"] = {"solon": mine, peer: other, "ratio": mine / other}
            found.append(result)
            print(f"{peer}, K = {principles}, {given.dtype}: {said(result['ratio'])}; "
                  f"{said(result['of_limit'], 'of the limit')}; tokens {result['tokens_saved']:.2f} to 1"
                  + (f"; memory {result['peak_mb']['ratio']:.2f} of its" if given.memory_pairs else ""))  # fmt: skip
            keep(given.name, {"judging": found})


if __name__ == "__main__":
    main()
