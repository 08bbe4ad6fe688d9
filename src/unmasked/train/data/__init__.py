"""What is a stage trained on?

`texts` has plain texts, and for MNTP blocks of token ids from a memory-mapped file. `pairs` has
rows of query, positive and negatives, which are checked and then kept in an Arrow file that is also
memory-mapped. `mixing` decides which rows share a batch, and turns them into the model's input.
Cost: each text is read once to check it and once to store it; memory holds indices, not texts
(except those of SimCSE).

Others may use every name in these files that has no leading underscore.
"""
