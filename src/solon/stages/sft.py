"""Supervised fine-tuning: what warm-up and SL-CAI share, and the verb `solon sft`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solon.models.settings import AdapterSettings
from solon.records import SFTExample
from solon.runs.options import FULL, OUT, REQUIRED, TO_MODEL, TRAINED_MODEL, Option, Training, Verb
from solon.training.settings import Progress, TrainSettings

if TYPE_CHECKING:
    from solon.runs.call import Call
    from solon.runs.run import Run


def train_on(
    run: Run,
    stage: str,
    examples: Sequence[SFTExample],
    model: str,
    train: TrainSettings,
    adapter: AdapterSettings | None = None,
    *,
    left_out: Mapping[str, int],
    opening_examples: Sequence[SFTExample] = (),
) -> str:
    """Fine-tune a model on examples in a run. Returns the new model's directory.

    left_out: by reason, what taught nothing and is not among the examples; beside what training itself leaves out.
    opening_examples: more examples, of which the first tokens alone are learned.
    The examples that the training learns are written to STAGE/examples.jsonl, with the principles of each.
    """
    from solon.engines.identity import of_model
    from solon.identity import of_inputs
    from solon.publishing import write_whole
    from solon.supervised.sft import sft

    recipe, out = run.recipe, run.model(stage)

    def keep(learned: Sequence[SFTExample]) -> None:
        lines = (json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in learned)
        write_whole(run.path(stage, "examples.jsonl"), "".join(lines))

    def work(step: Progress) -> dict[str, Any]:
        with run.tracked(stage, step, train) as step:
            result = sft(
                examples, model, out, settings=train, adapter=adapter or recipe.adapter, system=recipe.system,
                seed=recipe.seed, dtype=recipe.learning_dtype, progress=step, learned=keep,
                opening_examples=opening_examples,
            )  # fmt: skip
        return {**result, "left_out": dict(Counter(left_out) + Counter(result.get("left_out") or {}))}

    made_from = {"model": of_model(model), "examples": of_inputs(examples)}
    if opening_examples:
        made_from["first tokens of"] = of_inputs(opening_examples)
    run.once(stage, work, makes=out, made_from=made_from)
    return str(out)


class SFT(Verb):
    """Supervised fine-tuning; writes a complete model.

    Example: `solon sft --data solon:demonstrations-harmless --out sft`
    """

    name = "sft"
    takes = (
        Option("data", str, REQUIRED, "SFT examples (TRL conversational), or revision chains."),
        OUT, TRAINED_MODEL, FULL,
    )  # fmt: skip
    settings = (TrainSettings, AdapterSettings)
    common = TO_MODEL
    trains = processes = True

    def run(self, call: Call) -> None:
        from solon.data import read_demonstrations, read_revision_chains
        from solon.data.readers import first_line
        from solon.identity import of_records
        from solon.supervised.dataset import from_chains
        from solon.supervised.sft import sft

        settings, full = call.of(TrainSettings), call["full"]
        adapter = None if full else call.of(AdapterSettings)

        def prepare() -> Training:
            unlearned: dict[str, int] = {}
            if "steps" in first_line(call["data"]):
                examples, unlearned = from_chains(read_revision_chains(call["data"]))
            else:
                examples = read_demonstrations(call["data"])
            examples = examples[: call.limit]

            def train(out: Path, dtype: str, step: Progress) -> dict[str, Any]:
                return sft(
                    examples, call["model"], out, settings=settings, adapter=adapter, system=call.system, seed=call.seed,
                    dtype=dtype, progress=step,
                )  # fmt: skip

            return Training({"data": of_records(examples), "full": full}, train, left_out=unlearned)

        result = call.training([call["data"]], prepare)
        call.tell(f"{call.out}: loss {result['loss_first']:.3f} → {result['loss_last']:.3f}")
        call.result(result)
