"""What did others do differently: the original `llm2vec` package and the seed system?

The answer is `llm2vec.LLM2Vec`, the class that users get as `unmasked.LLM2Vec`: a
`model.TextEncoder` that takes the original's calls and reads its checkpoints to the vectors they
were published with; and `seed`, which turns the flags of the seed system's two commands into a
recipe. Nothing below this room imports it: `TextEncoder` offers class methods (`read_checkpoint`,
`text_tokenizer`, `text_pooling`) that `LLM2Vec` replaces. Cost: none unless a checkpoint is of the
original's, or ``compat="llm2vec-0.2"`` is asked for, which tokenises each text twice.

Others may use:
    llm2vec    `LLM2Vec`: load names and folders with it
    original   `is_original`, `PUBLISHED`: checkpoints of the original package
    seed       the seed system's flags as a recipe
"""
