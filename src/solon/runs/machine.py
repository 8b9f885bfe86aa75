"""Facts about this machine and this process: versions and peak memory."""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from solon import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def peak_memory_mb() -> int:
    """The peak memory of this process so far, MiB; 0 where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def peak_gpu_memory_mb() -> int:
    """The peak memory of this process's tensors on one GPU so far, MiB; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) // 2**20


@functools.cache
def versions() -> Mapping[str, str]:
    """The versions of Solon, Python and the packages in PACKAGES, and the machine's architecture, by name."""
    return {
        "solon": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
