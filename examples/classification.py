"""Classification: a linear classifier on the vectors of a few labelled texts.

    python examples/classification.py [MODEL]

MODEL is a hub name or folder; without it, the bundled decoder, offline and in seconds.
"""

from __future__ import annotations

import sys

from sklearn.linear_model import LogisticRegression

from unmasked import LLM2Vec

INSTRUCTION = "Classify what kind of documentation this sentence is from:"
TRAIN = {
    "files": [
        "Open a file and return a file object.",
        "Read the whole file into memory.",
        "Write bytes to a file on disk.",
        "Close the file and flush its buffer.",
        "Return the size of a file in bytes.",
        "Remove a file or a directory.",
    ],
    "numbers": [
        "Return the sine of x in radians.",
        "Compute the mean of an array.",
        "Return the largest value of a sequence.",
        "Multiply two matrices.",
        "Draw samples from a normal distribution.",
        "Return the square root of x.",
    ],
    "networks": [
        "Send a request to the server.",
        "Open a connection to a host and port.",
        "Parse the headers of a response.",
        "Bind the socket to an address.",
        "Return the address of the remote host.",
        "Wait until the socket can be read.",
    ],
}
TEST = {
    "files": ["Rename a file on disk.", "Return the contents of a file as bytes."],
    "numbers": ["Return the cosine of x.", "Compute the standard deviation of an array."],
    "networks": ["Close the connection to the server.", "Listen on a socket for connections."],
}


def pairs(labelled: dict[str, list[str]]) -> list[list[str]]:
    return [[INSTRUCTION, text] for texts in labelled.values() for text in texts]


def labels(labelled: dict[str, list[str]]) -> list[str]:
    return [label for label, texts in labelled.items() for _ in texts]


def main(name: str = "nano") -> float:
    model = LLM2Vec.from_pretrained(name)
    probe = LogisticRegression(max_iter=1000).fit(
        model.encode(pairs(TRAIN), normalize_embeddings=True), labels(TRAIN)
    )
    found = probe.predict(model.encode(pairs(TEST), normalize_embeddings=True))
    for (_, text), label in zip(pairs(TEST), found, strict=True):
        print(f"{label:9} {text}")
    right = [a == b for a, b in zip(found, labels(TEST), strict=True)]
    print(f"accuracy {sum(right) / len(right):.2f}")
    return sum(right) / len(right)


if __name__ == "__main__":
    main(*sys.argv[1:])
