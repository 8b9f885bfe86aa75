"""The supervised stage (SL-CAI): response → critique → revision, then fine-tuning on the revisions."""

from solon.engines.base import Sampling

# How responses, critiques and revisions are sampled unless told otherwise, by `solon critique` and by every recipe. At
# temperature 0.7 without top-p a small model writes word salad. Servers know no repetition penalty as a rule.
SAMPLING = Sampling(max_tokens=96, temperature=0.5, top_p=0.9, repetition_penalty=1.15)
