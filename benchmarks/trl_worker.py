"""TRL's reward and PPO trainers, in an environment of their own (this imports nothing of Solon's).

    python trl_worker.py reward|ppo JOB.json

The job holds the model's directory, the rows and the settings. Training waits for a line on standard input before each
part of it (some steps of reward modelling, one update of PPO), and answers with a line of JSON when the part is done.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def say(**found: Any) -> None:
    print(json.dumps({"peak_mb": peak_mb(), **found}), flush=True)


class Parts(TrainerCallback):  # type: ignore[misc]
    """Waits before each part of so many steps, and says how long the part took."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.logs = steps, 0.0, {}
        self.more: dict[str, Any] = {}  # said along with each part

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        say(ready=True)
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            say(seconds=time.perf_counter() - self.started, step=state.global_step, logs=self.logs, **self.more)
            self._wait()  # after the last one too: what comes then would run beside the other side's turn


def lora(job: dict[str, Any], task: str) -> LoraConfig:
    return LoraConfig(
        r=job["rank"],
        lora_alpha=2 * job["rank"],
        lora_dropout=0.0,
        target_modules=job["target_modules"],
        task_type=task,
    )


def reward(job: dict[str, Any]) -> None:
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.zeros_(model.score.weight)
    config = RewardConfig(
        output_dir=job["out"], per_device_train_batch_size=job["batch"], num_train_epochs=1, learning_rate=job["rate"],
        lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.0, max_length=job["max_length"], logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(job["rows"]), processing_class=tokenizer,
        peft_config=lora(job, "SEQ_CLS"), callbacks=[Parts(job["steps"])],
    )  # fmt: skip
    trainer.train()
    peak, right = peak_mb(), 0.0
    trained = trainer.model.eval()
    with torch.no_grad():
        for row in job["test"]:
            a, b = (score(trained, tokenizer, row[side]) for side in ("chosen", "rejected"))
            right += 1.0 if a > b else 0.5 if a == b else 0.0
    say(right=right, n=len(job["test"]), peak_training_mb=peak)


def score(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> float:
    ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
    return model(input_ids=ids).logits.item()


def ppo(job: dict[str, Any]) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    kind = AutoModelForSequenceClassification
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    value = kind.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    rewards = kind.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(value.score.weight)  # as Solon's value head starts
    head = torch.nn.Linear(rewards.score.in_features, 1)  # the reward in standard deviations, as Solon gives it
    with torch.no_grad():
        head.weight.copy_(rewards.score.weight / job["std"])
        head.bias.fill_(-job["mean"] / job["std"])
    rewards.score = head
    for model in (policy, value, rewards):
        model.config.pad_token_id = tokenizer.pad_token_id
    parts = Parts(1)

    def keep_rollouts(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        parts.more["rollouts"] = [ids[mask.bool()].tolist() for ids, mask in seen]

    # TRL reads a response that was cut at its last word, Solon behind it; told what was scored, Solon can read both alike.
    getattr(rewards, rewards.base_model_prefix).register_forward_pre_hook(keep_rollouts, with_kwargs=True)
    n = job["rollouts"]
    config = PPOConfig(
        output_dir=job["out"], per_device_train_batch_size=job["micro"], gradient_accumulation_steps=n // job["micro"],
        num_mini_batches=1, num_ppo_epochs=job["epochs"], total_episodes=n * job["updates"], response_length=job["tokens"],
        local_rollout_forward_batch_size=n, temperature=job["temperature"], learning_rate=job["rate"], kl_coef=job["kl"],
        missing_eos_penalty=job["missing_end"], stop_token="eos", lr_scheduler_type="constant", gamma=1.0, lam=job["lam"],
        vf_coef=0.5, num_sample_generations=0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False, seed=job["seed"],
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=rewards, value_model=value,
        train_dataset=Dataset.from_list(job["rows"]), eval_dataset=Dataset.from_list(job["rows"][:n]),
        peft_config=lora(job, "CAUSAL_LM") if job["lora"] else None, callbacks=[parts],
    )  # fmt: skip
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    made = Path(job["out"]) / "policy"
    (policy.merge_and_unload() if job["lora"] else policy).save_pretrained(made)
    tokenizer.save_pretrained(made)
    say(policy=str(made))


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(given["threads"])
    {"reward": reward, "ppo": ppo}[sys.argv[1]](given)
