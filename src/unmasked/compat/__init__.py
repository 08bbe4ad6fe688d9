"""What did the original `llm2vec` package and the seed system do differently?

The answer is `llm2vec.LLM2Vec`, the class that users get as `unmasked.LLM2Vec`: a
`model.TextEncoder` that accepts the original's calls, and whose vectors for its checkpoints are
those they were published with; and `seed`, which turns the flags of the seed system's two commands
into a recipe. Nothing below this room imports it: `TextEncoder` has class methods
(`read_checkpoint`, `text_rules`) that `LLM2Vec` overrides. Cost: none, unless a checkpoint comes
from the original package, or ``compat="llm2vec-0.2"`` is set, which tokenises each text twice.

Others may use:
    llm2vec    `LLM2Vec`: load names and folders with it
    original   `is_original`, `PUBLISHED`: checkpoints of the original package
    origin     `find_base`, `training_data`: the decoder behind a model, and its training data
    seed       the seed system's flags as a recipe
"""
