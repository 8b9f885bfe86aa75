"""The artifacts that Solon's own stages make and need. A model is named as for `--model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from solon.records import Comparison, Pair, RevisionChain
from solon.runs import Artifact
from solon.stages.data import Data

if TYPE_CHECKING:
    from solon.reinforcement.reward import Reward

DATA = Artifact[Data]("data")  # the prompts, demonstrations and human comparisons of the recipe's files
START_MODEL = Artifact[str]("start model")
WARM_MODEL = Artifact[str]("warmed-up model")
SUPERVISED_MODEL = Artifact[str]("supervised model")
POLICY = Artifact[str]("policy")
JUDGE = Artifact[str]("judge")
CHAINS = Artifact[list[RevisionChain]]("revision chains")
SENSE_KEPT = Artifact[bool]("supervised model that keeps its sense")
CHOICES = Artifact[list[Comparison]]("choices")  # between the last revision of each chain and its first response
PAIRS = Artifact[list[Pair]]("pairs")
COMPARISONS = Artifact[list[Comparison]]("comparisons")  # of the pairs, by the judge
HELDOUT_JUDGED = Artifact[list[Comparison]]("judged held-out comparisons")
LEARNED = Artifact[list[Comparison]]("comparisons to learn from")
REWARD: Artifact[Reward] = Artifact("reward")
KL = Artifact[dict[str, Any]]("KL of the policy")

BASE_MODEL = (SUPERVISED_MODEL, WARM_MODEL, START_MODEL)  # reinforcement starts from the first of these that exists
