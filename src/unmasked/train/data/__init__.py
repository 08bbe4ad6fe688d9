"""What is a stage trained on?

Three answers. `texts`: plain texts, and for MNTP blocks of token ids from a file that is mapped
into memory. `pairs`: rows of query, positive and negatives, each checked, then kept in an Arrow
file that is mapped as well. `mixing`: which rows share a batch, and what the model is given of
them. Cost: each text is read once to check it and once to keep it; memory holds indices, not texts
(but for SimCSE's).

Others may use every name in these files that has no leading underscore.
"""
