"""One optimiser step of each trainer, and the gradients it had: run alone and by several processes (test_processes.py).

python gradients.py MODEL OUT sft reward feedback ppo
"""

from __future__ import annotations

import gc
import random
import sys
from pathlib import Path
from typing import Any

import torch

from solon import distributed
from solon.constitution import Constitution
from solon.feedback.feedback_model import train_feedback_model
from solon.feedback.questions import HHH
from solon.feedback.settings import FeedbackTrainSettings
from solon.models.lora import add_adapters
from solon.models.settings import AdapterSettings
from solon.records import Comparison, SFTExample, assistant, user
from solon.reinforcement import trainer
from solon.reinforcement.reward_training import train_reward_model
from solon.reinforcement.rollout import Rollouts
from solon.reinforcement.settings import RewardSettings
from solon.supervised.sft import sft
from solon.training.settings import TrainSettings

ADAPTER = AdapterSettings(rank=4, alpha=8)
COMPARISONS = [
    Comparison(
        id=str(i), prompt=(user(f"question {i}"),), chosen=(assistant("good " * (i % 5 + 1)),),
        rejected=(assistant("poor " * (i % 3 + 1)),), label=0.6 + 0.05 * i, labeler="human" if i % 2 else "ai",
    )
    for i in range(6)
]  # fmt: skip
EXAMPLES = [SFTExample(id=str(i), messages=(user(f"say {i}"), assistant("yes " * (i + 1)))) for i in range(6)]


def ppo(model: str) -> None:
    from solon.models.weights import load_causal_lm

    policy = load_causal_lm(model, dtype="float32", learns=True)[0]
    torch.manual_seed(0)
    policy = add_adapters(policy, ADAPTER).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    contexts = [[5, 6, 7], [5, 6, 7], [5, 8], [9], [5, 6]]
    responses = [[9, 10], [9, 11, 12, 13], [11], [5, 6, 7], [20, 21, 22, 23, 24]]
    rollouts = Rollouts(contexts, responses, pad=0, device=torch.device("cpu"))
    settings = trainer.PPOSettings(rollouts=5, minibatch=5, epochs=1, entropy_bonus=0.01)
    raw, ended = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0]), torch.tensor([True, False, True, True, True])
    state = trainer.start_state(policy, settings, None)
    summary = trainer.learn(state, rollouts, raw, ended, settings, random.Random(0))
    found["summary"] = summary.numbers()


def work(what: str, model: str, out: Path) -> None:
    given: dict[str, Any] = {"adapter": ADAPTER, "system": None, "dtype": "float32"}
    settings = TrainSettings(epochs=1, batch_size=6)
    if what == "sft":
        found["loss"] = sft(EXAMPLES, model, out, settings=settings, **given)["loss_first"]
    elif what == "reward":
        weights = RewardSettings(batch_size=6, weights={"human": 2.0})
        made = train_reward_model(COMPARISONS, model, out, settings=weights, reference=[], **given)
        found["loss"] = made["loss_first"]
    elif what == "feedback":
        rules = Constitution.from_question(HHH)
        asked = FeedbackTrainSettings(batch_size=6)
        made = train_feedback_model(COMPARISONS, rules, model, out, question=HHH, settings=asked, **given)
        found["loss"] = made["loss_first"]
    else:
        ppo(model)


found: dict[str, Any] = {}


def share_held() -> float:
    """Of the weights that processes share out, how much stands in this one."""
    from torch.distributed.tensor import DTensor

    shared = [x for x in gc.get_objects() if isinstance(x, DTensor)]
    return sum(x.to_local().numel() for x in shared) / max(1, sum(x.numel() for x in shared))


def main() -> None:
    model, out, trainers = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    step = torch.optim.AdamW.step

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if distributed.is_sharded():
            found.setdefault("held", share_held())
        found.setdefault("gradients", [p.grad.clone() for g in self.param_groups for p in g["params"]])
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = recorded  # type: ignore[method-assign]
    for what in trainers:
        found.clear()
        gc.collect()  # of the trainer before
        work(what, model, out / what)
        if distributed.is_main():
            torch.save({**found, "world": distributed.world_size()}, out / f"{what}.pt")
    distributed.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a process that ends with the group's threads at work may abort


if __name__ == "__main__":
    main()
