"""Every family of causal language models that transformers can build small: is Solon right with it?

    python -m benchmarks.families                 # all families, as a table in Markdown
    python -m benchmarks.families qwen3 gemma2    # some of them

A model of random weights is built for each family and goes through Solon as a user's model does. Its sampler, its scorer and
its trainer are compared with a second copy of the model that uses transformers' eager attention, one row at a time. This is
another check than the one at loading (`solon/models/proof.py`): other rows, longer ones (beyond windows), and adapters that
learn. The outcome is `fast` or `plain`, the largest difference, or `refused` with the reason.
"""

from __future__ import annotations

import argparse
import copy
import signal
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 320
BUILDING = 40  # seconds after which a family counts as too large to be built small
# What most configurations call their sizes; each gets those that it knows.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 96, "d_model": 64, "n_layers": 4, "n_heads": 4, "num_layers": 4,
    "num_heads": 4, "ffn_dim": 96, "ffn_hidden_size": 96, "word_embed_proj_dim": 64, "max_seq_len": 256, "rotary_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "sliding_window": 32, "attention_chunk_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "num_global_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.15, "init_std": 0.15, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 16, "time_step_rank": 8, "state_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "lru_width": 64, "attention_window_size": 32,
}  # fmt: skip
# What a family needs besides, so that it can be built this small.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 256},
    "mpt": {"max_seq_len": 256},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "llama4_text": {"attn_temperature_tuning": False, "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0], "layer_types": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 8, "chunk_size": 16, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_expand": 2},
    "qwen3_next": {"full_attention_interval": 2},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "persimmon": {"num_key_value_heads": None},
    "nemotron": {"head_dim": 16},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True},
    "glm4_moe": {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16, "head_dim": 16, "num_key_value_heads": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2, "shared_intermediate_size": 48},
}  # fmt: skip
# Not language models that answer in text by themselves: encoders, speech, pictures, halves of encoder-decoder models.
OTHERS = set(
    [
        "aria_text",
        "bart",
        "beam",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "cpmant",
        "ctrl",
        "cwm",
        "data2vec-text",
        "electra",
        "emu3",
        "ernie",
        "fuyu",
        "git",
        "got_ocr2",
        "marian",
        "mbart",
        "megatron-bert",
        "mllama",
        "modernbert-decoder",
        "moshi",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xglm",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "moss_transcribe_diarize",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """path: `fast`, `plain` or `refused`; wrong: what the independent check found, in nats; note: why not fast."""

    family: str
    path: str
    way: str = ""
    sampler: float | None = None
    scorer: float | None = None
    trainer: float | None = None
    bfloat16: str = ""
    layers: str = ""
    note: str = ""

    @property
    def wrong(self) -> bool:
        found = [x for x in (self.sampler, self.scorer, self.trainer) if x is not None]
        return self.path != "refused" and (not all(x <= 1e-3 for x in found) or self.layers not in ("", "as asked"))


def build(family: str) -> Any:
    """A small model of the family with random weights, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    given = {**SMALL, **NEEDED.get(family, {})}
    fixed = {k for k in given if isinstance(getattr(type(text), k, None), property)}  # follows from other sizes
    named = {*text.to_dict(), *text.attribute_map, *NEEDED.get(family, {})}
    known = {k: v for k, v in given.items() if k in named and k not in fixed}
    if hasattr(text, "qk_rope_head_dim"):  # which is then the heads' width, or follows from it
        known.pop("head_dim", None)
        known["num_key_value_heads"] = known["num_attention_heads"]
    if getattr(text, "sliding_window", 0) is None:
        known.pop("sliding_window", None)
    made = type(text)(**{k: v for k, v in known.items() if v is not None or k in NEEDED.get(family, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases, norms and sinks start as if they were not there
            if p.dim() == 1 and p.is_floating_point():
                p += 0.2 * torch.randn_like(p)
    return model


def reference(model: Any) -> Any:
    """A copy that goes transformers' own way with eager attention."""
    from solon.models.forward import use_attention

    twin = copy.deepcopy(model)
    if twin._can_set_attn_implementation():
        use_attention(twin, "eager")
    return twin


def logprobs(model: Any, row: list[int]) -> Tensor:
    """Of each token of the row but the first, computed by transformers on the row alone."""
    from solon.models.forward import forward

    ids = torch.tensor([row])
    with torch.no_grad():
        logits = forward(model, input_ids=ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def rows(seed: int) -> list[list[int]]:
    """Rows of 3 to 45 tokens, three of which begin alike."""
    draw = torch.Generator().manual_seed(seed)

    def some(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()

    shared = some(20)
    return [some(3), shared + some(4), shared + some(25), some(9), shared]


def check(family: str) -> Outcome:
    """Build, load, and compare."""
    from solon.errors import InputError
    from solon.models.paths import paths_of

    try:
        signal.alarm(BUILDING)
        model = build(family)
        signal.alarm(0)
        twin = reference(model)
        if not logprobs(twin, rows(0)[1]).isfinite().all():
            raise ValueError("random weights make numbers that are not finite")
    except Exception as error:  # sizes that do not fit one another
        signal.alarm(0)
        return Outcome(family, "not built", note=first_line(error))
    try:
        paths = paths_of(model)
    except InputError as error:
        return Outcome(family, "refused", note=str(error))
    narrow = in_bfloat16(model)
    way = "fast" if paths.prefix_tree else "plain"
    kind = "own forward pass" if paths.llama_forward else "tree" if paths.prefix_tree else paths.attention
    try:
        sampler, scorer = sampled(model, twin), scored(model, twin)
        trainer, layers = trained(model, twin)
    except InputError as error:
        return Outcome(family, way, kind, sampler, scorer, bfloat16=narrow, note=f"no adapters: {first_line(error)}")
    except Exception as error:
        return Outcome(
            family, way, kind, float("inf"), bfloat16=narrow, note=f"{type(error).__name__}: {first_line(error)}"
        )
    return Outcome(family, way, kind, sampler, scorer, trainer, narrow, layers, "; ".join(paths.notes))


def in_bfloat16(model: Any) -> str:
    """The path that a copy of the model takes in bfloat16."""
    from solon.errors import InputError
    from solon.models.paths import paths_of

    narrow = copy.deepcopy(model)
    for name in ("_solon_paths", "_solon_head"):
        vars(narrow).pop(name, None)
    try:
        return "fast" if paths_of(narrow.to(torch.bfloat16)).prefix_tree else "plain"
    except InputError:
        return "refused"


def sampled(model: Any, twin: Any) -> float:
    from solon.models.decoding import decode

    prompts = rows(1)
    uniforms = torch.rand((len(prompts), 12), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = decode(model, prompts, uniforms, max_tokens=12, temperature=1.0, end=set(range(3, 40)))
    worst = 0.0
    for prompt, m in zip(prompts, made, strict=True):
        said = m.ids + ([] if m.end is None else [m.end])
        expected = logprobs(twin, prompt + said)[len(prompt) - 1 :]
        worst = max(worst, (torch.tensor(m.logprobs) - expected).abs().max().item())
    return worst


def scored(model: Any, twin: Any) -> float:
    from solon.engines.local import LocalEngine
    from solon.models.batching import Row

    engine = LocalEngine.__new__(LocalEngine)
    engine.model, engine._pad, engine.score_tokens = model, 0, 3072
    engine.prepare()
    asked = [r for r in rows(3) if len(r) > 1]
    worst = 0.0
    for picked, logits in engine._logits([Row(r[:-1], 0) for r in asked]):
        for r, each in zip(picked, logits.split([len(asked[r]) - 1 for r in picked]), strict=True):
            tokens = torch.tensor(asked[r][1:])
            found = each.log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[:, 0]
            worst = max(worst, (found - logprobs(twin, asked[r])).abs().max().item())
    return worst


def trained(model: Any, twin: Any) -> tuple[float, str]:
    """The trainer's log-probs with adapters on the top two blocks, against the same adapters on the twin."""
    from peft import get_peft_model

    from solon.models.head import head_of, logprobs_and_entropy
    from solon.models.lora import adapted_layers, add_adapters, blocks_of, exact_names, linear_layers, lora_config
    from solon.models.passes import lay_out, lower_blocks
    from solon.models.settings import AdapterSettings

    settings = AdapterSettings(rank=2, layers=2)
    asked = linear_layers(twin, 2)
    where, blocks = blocks_of(twin) or ("", [])
    expected = {f"{where}.{len(blocks) - 2 + n}" for n in range(2)}
    policy = add_adapters(model, settings)
    with exact_names():
        other = get_peft_model(twin, lora_config(twin, settings, "CAUSAL_LM")).eval()
    weights = dict(other.named_parameters())
    for name, p in policy.named_parameters():
        if ".lora_" in name:
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
            weights[name].data.copy_(p.data)
    said = rows(4)
    layout = lay_out(policy, said, 0)
    hidden = layout.gather(layout.hidden_states(policy), [range(len(r) - 1) for r in said])
    tokens = torch.tensor([t for r in said for t in r[1:]])
    found, _ = logprobs_and_entropy(hidden, head_of(policy), tokens, 1.0, entropy=False)
    found.sum().backward()
    base = other.get_base_model()
    expected_logprobs = torch.cat([logprobs(base, r) for r in said])
    worst = (found.detach() - expected_logprobs).abs().max().item()
    if frozen := lower_blocks(policy, 0):  # PPO's passes, which start above the blocks that do not learn
        frozen.add(said)
        with torch.no_grad():
            hidden = layout.gather(frozen.hidden_states(layout, said), [range(len(r) - 1) for r in said])
            found, _ = logprobs_and_entropy(hidden, head_of(policy), tokens, 1.0, entropy=False)
        worst = max(worst, (found - expected_logprobs).abs().max().item())
    names = adapted_layers(policy)
    right = set(names) == set(asked) and {".".join(n.split(".")[: where.count(".") + 2]) for n in names} <= expected
    return worst, "as asked" if right else f"{len(names)} adapted, {len(asked)} asked"


def too_large(*_: Any) -> None:
    raise TimeoutError("its configuration stays large whatever is set small")


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:140]


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in OTHERS]


def table(found: list[Outcome]) -> str:
    """As Markdown."""
    lines = ["| family | float32 | by | sampler | scorer | trainer | bfloat16 | why not fast |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for o in found:
        numbers = ("" if x is None else f"{x:.0e}" for x in (o.sampler, o.scorer, o.trainer))
        path = f"{o.path}{' WRONG' if o.wrong else ''}"
        lines.append(f"| {o.family} | {path} | {o.way} | {' | '.join(numbers)} | {o.bfloat16} | {o.note} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", nargs="*")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, too_large)
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for name in given.family or families():
        found.append(check(name))
        print(table(found[-1:]).splitlines()[-1], flush=True)
    print()
    built = [o for o in found if o.path != "not built"]
    for path in ("fast", "plain", "refused"):
        print(f"{path}: {sum(o.path == path for o in built)}")
    print(f"wrong: {sum(o.wrong for o in built)} of {len(built)}; not built: {len(found) - len(built)}")


if __name__ == "__main__":
    main()
