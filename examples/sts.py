"""Sentence similarity: cosines beside human scores. Both sides have the same instruction.

python examples/sts.py [MODEL]
"""

from __future__ import annotations

import sys

from scipy.stats import spearmanr

from unmasked import LLM2Vec

INSTRUCTION = "Retrieve semantically similar text:"
PAIRS = [
    ("A man is playing a guitar.", "A man plays the guitar.", 5.0),
    ("The cat sleeps on the sofa.", "A cat is sleeping on a couch.", 4.5),
    ("She opened the file and read it.", "She read the file she had opened.", 4.5),
    ("The function returns a list.", "The function returns an array.", 3.5),
    ("A dog runs across the field.", "A cat runs across the street.", 2.0),
    ("He is cooking dinner.", "He is reading the news.", 1.0),
    ("The train leaves at noon.", "Compute the mean of an array.", 0.0),
    ("Close the file.", "The children sing in the garden.", 0.0),
]


def main(name: str = "nano") -> float:
    model = LLM2Vec.from_pretrained(name)
    first, second = (model.encode([[INSTRUCTION, p[side]] for p in PAIRS]) for side in (0, 1))
    cosines = model.similarity_pairwise(first, second).tolist()
    for (a, b, score), cosine in zip(PAIRS, cosines, strict=True):
        print(f"{cosine:5.2f}  {score:3.1f}  {a}  |  {b}")
    correlation = float(spearmanr(cosines, [score for *_, score in PAIRS]).statistic)
    print(f"Spearman {correlation:.2f}")
    return correlation


if __name__ == "__main__":
    main(*sys.argv[1:])
