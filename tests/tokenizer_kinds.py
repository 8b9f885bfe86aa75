"""Small tokenizers of every kind that chat models have, made on the spot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "A user asks what tea is, and the assistant answers. The answer is (A) or (B).\n\nHow are you? I am fine.",
    "system user assistant You are a helpful assistant. Which of the two is better? Say (A), (B) or 10.",
    "Ünïcödé, 你好 world 🙂 e\u0301 ﬁne  two   three    spaces\ttab",
] * 30
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # BOS by the template, system text inside the first user turn, contents trimmed
    "{% if messages[0]['role'] == 'system' %}{% set ns = namespace(s='<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n') %}"
    "{% set messages = messages[1:] %}{% else %}{% set ns = namespace(s='') %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (ns.s + m['content']).strip() + ' [/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
PLAIN = (  # no control token at all but the end
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "plain": PLAIN}


def _bpe(pre: Any, decoder: Any = None, normalizer: Any = None, **options: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", **options))
    if pre is not None:
        made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoder or decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if decoder is None else [*map(chr, range(32, 127)), "\u2581", "\n"]
    fallback = [f"<0x{i:02X}>" for i in range(256)] if options.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL + fallback, initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def _metaspace(scheme: str) -> Tokenizer:
    return _bpe(
        pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme), byte_fallback=True
    )


def _legacy() -> Tokenizer:
    """Llama 2: a normaliser that puts `▁` before every piece, and no pre-tokeniser."""
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _bpe(None, decoders.Replace("\u2581", " "), normalizer, byte_fallback=True, fuse_unk=True)


def _byte_level(**options: Any) -> Tokenizer:
    return _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, **options))


def _llama3() -> Tokenizer:
    """A pattern, then bytes; offsets without the space before a word; a post-processor that adds BOS."""
    pattern = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made = _bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizer=normalizers.NFC(),
    )
    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=SPECIAL + fallback, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    )
    return made


def _stripping() -> Tokenizer:
    """Control tokens that take the white space beside them (Phi-3's do)."""
    made = _metaspace("first")
    made.add_special_tokens([AddedToken(t, lstrip=True, rstrip=True, special=True) for t in SPECIAL[1:]])
    return made


def _not_special() -> Tokenizer:
    """A control token that is an added token like any other."""
    made = _byte_level()
    made.add_tokens([AddedToken("<|im_start|>", special=False), AddedToken("<|im_end|>", special=False)])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "llama3": _llama3,
    "metaspace-always": lambda: _metaspace("always"),
    "metaspace-first": lambda: _metaspace("first"),
    "metaspace-never": lambda: _metaspace("never"),
    "llama2-legacy": _legacy,
    "unigram": _unigram,
    "word-piece": _word_piece,
    "stripping": _stripping,
    "normalised-control": _not_special,
}


@functools.cache
def tokenizer_of(kind: str, template: str = "chatml") -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    made.chat_template = TEMPLATES[template]
    return made
