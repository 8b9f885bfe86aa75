"""distilabel's judge, in an environment of its own (it imports nothing of Solon's).

    python distilabel_worker.py MODEL_DIR THREADS

Each line of standard input is a JSON list of [instruction, response, response]; each is answered with a line
{"seconds", "answered", "peak_mb"}. The task is UltraFeedback, "overall-rating", as it comes: the model writes a
rating and a rationale for both responses in one order, and the ratings are parsed from its text.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from distilabel.models import TransformersLLM
from distilabel.steps.tasks import UltraFeedback


def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    llm = TransformersLLM(model=model, torch_dtype="float32", generation_kwargs={"max_new_tokens": 128})
    task = UltraFeedback(llm=llm, aspect="overall-rating", use_default_structured_output=False, input_batch_size=8)
    task.load()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        rows = [{"instruction": i, "generations": [a, b]} for i, a, b in json.loads(line)]
        started = time.perf_counter()
        made = [row for n in range(0, len(rows), 8) for row in next(task.process(rows[n : n + 8]))]
        took = time.perf_counter() - started
        answered = sum(len(r["ratings"] or []) >= 2 and None not in r["ratings"][:2] for r in made)
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = int(next(s for s in status.splitlines() if s.startswith("VmHWM")).split()[1]) / 1024
        print(json.dumps({"seconds": took, "answered": answered, "peak_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
