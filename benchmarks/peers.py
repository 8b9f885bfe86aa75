"""TRL in its own environment, as a process that trains part by part when it is told to (trl_worker.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TRL = Path(__file__).parents[1] / ".venv-trl" / "bin" / "python"


class Trl:
    def __init__(self, what: str, job: dict[str, Any]) -> None:
        if not TRL.is_file():
            raise SystemExit(f"{TRL} is not there; make .venv-trl/.installed")
        self._aside = tempfile.TemporaryDirectory()
        path = Path(self._aside.name) / "job.json"
        path.write_text(json.dumps({**job, "out": self._aside.name}))
        worker = str(Path(__file__).with_name("trl_worker.py"))
        log = Path(self._aside.name) / "log"
        self._process = subprocess.Popen(
            [str(TRL), worker, what, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log.open("w"), text=True,
        )  # fmt: skip
        self._log = log
        self.answer()  # ready

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"peak_mb"'):
                return json.loads(line)
        sys.exit(f"TRL's process ended:\n{self._log.read_text()[-3000:]}")

    def part(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._aside.cleanup()
