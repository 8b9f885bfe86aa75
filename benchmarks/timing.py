"""How things are timed here: side by side in one process, in turns, as ratios with their spread.

A shared machine drifts by 10 to 40 % within minutes, so a time by itself says little. Each part of the work is done
by both sides, the one that goes first changing from part to part (ABBA), and what is reported is the median of the
paired ratios with a bootstrap interval. The machine's limit is measured beside every part.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy")


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, made


def median_ratio(ratios: Sequence[float], resamples: int = 4000) -> dict[str, float | int]:
    """Median with its 95 % bootstrap interval, over the parts."""
    data = np.asarray(ratios)
    drawn = np.median(data[np.random.default_rng(0).integers(0, len(data), (resamples, len(data)))], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"median": float(np.median(data)), "low": float(low), "high": float(high), "parts": len(data)}


def product_rate(dtype: torch.dtype, device: str, seconds_for: float = 1.0) -> float:
    """FLOP/s of the faster of two matrix products, at its best: a large square one, and one of a small model's."""
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (2048, 576, 1536)):
        a = torch.randn(rows, inner, dtype=dtype, device=device)
        b = torch.randn(inner, columns, dtype=dtype, device=device)
        a @ b
        end = time.perf_counter() + seconds_for / 2
        while time.perf_counter() < end:
            took, _ = seconds(lambda a=a, b=b: [a @ b for _ in range(4)])
            best = max(best, 4 * 2 * rows * inner * columns / took)
    return best


def peak_mb() -> float:
    """The most memory this process has held, in MiB. Of Linux's own count: getrusage's goes over to a child process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def machine() -> dict[str, Any]:
    names = {}
    for name in PACKAGES:
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            names[name] = "not installed"
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    ) if Path("/proc/cpuinfo").is_file() else platform.processor()  # fmt: skip
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **names,
    }


def keep(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n", encoding="utf-8")
    return path


def said(ratio: dict[str, float | int], unit: str = "×") -> str:
    return f"{ratio['median']:.2f} {unit} [{ratio['low']:.2f}, {ratio['high']:.2f}], {ratio['parts']} parts"


def reference_data() -> Path:
    found = os.environ.get("SOLON_REFERENCE_DATA")
    return Path(found) if found else Path(__file__).parents[2] / "shared" / "data"
