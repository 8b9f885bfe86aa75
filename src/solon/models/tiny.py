"""A two-layer Llama with random weights, made on the spot: the whole pipeline in seconds, for tests.

It knows nothing. Its tokenizer is a byte-level one trained on a few lines of its own source, so that no file is
needed and any text round-trips.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from solon.publishing import new_directory, publish

END_LEAN = 2.4  # two answers in five end within twelve tokens
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(out: Path, seed: int = 0) -> Path:
    """Write the model to `out` unless it is there; the same seed makes the same weights."""
    if (out / "config.json").is_file():
        return out
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(fast),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                initializer_range=0.15,  # at the usual 0.02 its scores are so flat that nothing it learns could show
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
        with torch.no_grad():  # a direction that all tokens share and the end token more: answers end now and then
            shared = torch.nn.functional.normalize(torch.randn(32), dim=0)
            weight: Any = model.get_input_embeddings().weight
            weight += shared
            weight[2] += END_LEAN * shared
    aside = new_directory(out)
    model.save_pretrained(aside)
    fast.save_pretrained(aside)
    publish(aside, out)
    return out
