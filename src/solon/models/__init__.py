"""One language model in this process: its forward pass, its scores over the vocabulary, and the proof that both are right."""
