"""The supervised stage (SL-CAI): response → critique → revision, then fine-tuning on the revisions."""
