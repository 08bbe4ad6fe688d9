"""Clustering: separates the docstrings of three modules, without labels.

python examples/clustering.py [MODEL]
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score

from unmasked import LLM2Vec

INSTRUCTION = "Identify the module of a function from its documentation:"


def first_paragraphs(module: Any, most: int = 20) -> list[str]:
    """The first paragraph of each documented function and method of a module."""
    holders = [module, *(c for c in vars(module).values() if inspect.isclass(c))]
    members = [member for holder in holders for member in vars(holder).values()]
    found = [inspect.getdoc(member) for member in members if callable(member)]
    texts = [" ".join(doc.split("\n\n")[0].split()) for doc in found if doc]
    return [text for text in dict.fromkeys(texts) if len(text) > 20][:most]


def main(name: str = "nano") -> float:
    modules = [np.linalg, random, argparse]
    texts = {module.__name__: first_paragraphs(module) for module in modules}
    inputs = [[INSTRUCTION, text] for group in texts.values() for text in group]
    truth = [label for label, group in texts.items() for _ in group]
    vectors = LLM2Vec.from_pretrained(name).encode(inputs, normalize_embeddings=True)
    found = KMeans(len(modules), n_init=10, random_state=0).fit_predict(vectors)
    score = float(v_measure_score(truth, found))
    for cluster in range(len(modules)):
        members = [i for i in range(len(found)) if found[i] == cluster]
        print(f"cluster {cluster}: {len(members)} texts, such as {inputs[members[0]][1]!r}")
    print(f"v-measure {score:.2f}")
    return score


if __name__ == "__main__":
    main(*sys.argv[1:])
