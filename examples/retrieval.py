"""Retrieval: finds the passage that answers a question. Only queries have an instruction.

python examples/retrieval.py [MODEL]
"""

from __future__ import annotations

import sys

from unmasked import LLM2Vec

INSTRUCTION = "Given a question, retrieve the passage of a manual that answers it:"
PASSAGES = [
    "sorted(iterable) returns a new list of the items of the iterable in ascending order.",
    "str.split(sep) returns a list of the words of the string, with sep as the delimiter.",
    "open(file, mode) opens a file and returns a file object; mode 'w' truncates the file first.",
    "random.shuffle(x) shuffles the sequence x in place.",
    "json.loads(s) deserialises a string that contains a JSON document to a Python object.",
    "datetime.now() returns the current local date and time.",
]
QUESTIONS = {
    "how to sort a list of items in order": 0,
    "how to split a string into words": 1,
    "open a file to write to it": 2,
    "shuffle a sequence at random": 3,
    "read a JSON document from a string": 4,
    "what is the current date and time": 5,
}


def main(name: str = "nano") -> float:
    model = LLM2Vec.from_pretrained(name)
    passages = model.encode(PASSAGES)
    questions = model.encode([[INSTRUCTION, question] for question in QUESTIONS])
    best = model.similarity(questions, passages).argmax(dim=1).tolist()
    for question, found in zip(QUESTIONS, best, strict=True):
        print(f"{question}\n    {PASSAGES[found]}")
    right = [a == b for a, b in zip(best, QUESTIONS.values(), strict=True)]
    print(f"found first: {sum(right)} of {len(right)}")
    return sum(right) / len(right)


if __name__ == "__main__":
    main(*sys.argv[1:])
