"""Does labelling hold its memory however many pairs there are? Peak of a process of its own at each size.

python -m benchmarks.memory [--sizes 10000 100000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import keep, peak_mb


def pairs_file(path: Path, n: int) -> None:
    words = ["water", "kettle", "tea", "leaf", "steam", "cup", "spoon", "sugar", "table", "morning"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            a, b = (" ".join(words[(i * k + j) % len(words)] for j in range(3 + (i * k) % 9)) for k in (3, 7))
            file.write(
                json.dumps({"id": f"p{i}", "prompt": f"Question {i}: how is it done?", "responses": [a, b]}) + "\n"
            )


def one(n: int) -> None:
    from solon.constitution import load_constitution
    from solon.engines.local import LocalEngine
    from solon.feedback.judge import ModelJudge
    from solon.models.tiny import make_tiny_model
    from tests.asking import label

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pairs_file(root / "pairs.jsonl", n)
        engine = LocalEngine.load(str(make_tiny_model(root / "model")), dtype="float32")
        made = label(str(root / "pairs.jsonl"), root / "out.jsonl", ModelJudge(engine, load_constitution("simple")))
    print(json.dumps({"records": made["records"], "peak_mb": peak_mb()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        one(given.only)
        return
    found = {}
    for n in given.sizes:
        command = [sys.executable, "-m", "benchmarks.memory", "--only", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(n)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{n} pairs: {found[str(n)]['peak_mb']:.0f} MiB at its most, {found[str(n)]['records']} labelled")
    low, high = found[str(given.sizes[0])]["peak_mb"], found[str(given.sizes[-1])]["peak_mb"]
    print(f"{given.sizes[-1]} against {given.sizes[0]} pairs: {high / low:.3f} of the memory")
    keep("memory", {"sizes": found, "ratio": high / low})


if __name__ == "__main__":
    main()
