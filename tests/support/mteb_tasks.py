"""Small tasks of mteb's own classes, of texts made here: nothing is downloaded."""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import mteb
import numpy as np
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

RANDOM = np.random.default_rng(0)
LABELS = [f"label {n % 4}" for n in range(90)]
TEXTS = [f"text {n} of {label}" for n, label in enumerate(LABELS)]
PAIRS = [(TEXTS[n], TEXTS[(7 * n + 1) % 90]) for n in range(90)]
SCORES = RANDOM.integers(0, 11, 90) / 2
DOCUMENTS = {f"d{n}": text for n, text in enumerate(TEXTS)}
QUERIES = {f"q{n}": f"query {n}" for n in range(12)}
QRELS = {q: {f"d{int(d)}": 1 for d in RANDOM.choice(90, 4, replace=False)} for q in QUERIES}
CANDIDATES = {
    q: [*grades, *(f"d{int(d)}" for d in RANDOM.choice(90, 20) if f"d{int(d)}" not in grades)]
    for q, grades in QRELS.items()
}


def metadata(name: str, kind: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="made by a test",
        dataset={"path": "none/none", "revision": "1"},
        type=kind,
        eval_langs=["eng-Latn"],
        main_score=main_score,
        category="t2t",
    )


class Local:
    """Data that is there already."""

    data: ClassVar[Any]

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = self.data
        self.data_loaded = True


def split(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


PAIRED = {
    "sentence1": [first for first, _ in PAIRS],
    "sentence2": [second for _, second in PAIRS],
}


class LocalSTS(Local, AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 5
    data: ClassVar[Any] = {"test": split(**PAIRED, score=SCORES.tolist())}


class LocalPairs(Local, AbsTaskPairClassification):
    metadata = metadata("LocalPairs", "PairClassification", "max_ap")
    data: ClassVar[Any] = {"test": split(**PAIRED, labels=[int(score > 3) for score in SCORES])}


class LocalClustering(Local, AbsTaskClustering):
    metadata = metadata("LocalClustering", "Clustering", "v_measure")
    max_fraction_of_documents_to_embed, max_document_to_embed = None, 16_384
    data: ClassVar[Any] = {"test": split(sentences=TEXTS, labels=LABELS)}


class LocalClassification(Local, AbsTaskClassification):
    metadata = metadata("LocalClassification", "Classification", "accuracy")
    codes: ClassVar[list[int]] = [int(label[-1]) for label in LABELS]
    data: ClassVar[Any] = datasets.DatasetDict(
        train=split(text=TEXTS[:60], label=codes[:60]),
        test=split(text=TEXTS[60:], label=codes[60:]),
    )


def ranking(top_ranked: Any = None) -> dict[str, Any]:
    return {
        "corpus": split(id=list(DOCUMENTS), text=list(DOCUMENTS.values())),
        "queries": split(id=list(QUERIES), text=list(QUERIES.values())),
        "relevant_docs": QRELS,
        "top_ranked": top_ranked,
    }


class LocalRetrieval(Local, AbsTaskRetrieval):
    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")
    data: ClassVar[Any] = {"default": {"test": ranking()}}


ODD_DOCUMENTS = [
    {"_id": key, "title": "" if n % 3 else f"title {n}", "text": f"title {n} " * (n % 2) + text}
    for n, (key, text) in enumerate(DOCUMENTS.items())
]
ODD_QUERIES = {**QUERIES, "d5": TEXTS[5], "d6": TEXTS[6], "zero": "zero", "unjudged": "unjudged"}
ODD_QRELS = {
    **{q: {**grades, "gone": 1} for q, grades in QRELS.items()},
    "d5": {"d7": 2, "d11": 1, "d5": 0},
    "d6": {"gone too": 1},
    "zero": {"d1": 0},
    "another split's": {"d1": 1},
}
"""Queries that stand among the documents, documents and queries that are not there, titles."""


class LocalOddRetrieval(Local, AbsTaskRetrieval):
    metadata = metadata("LocalOddRetrieval", "Retrieval", "ndcg_at_10")
    ignore_identical_ids = True
    data: ClassVar[Any] = {
        "default": {
            "test": {
                "corpus": split(
                    id=[row["_id"] for row in ODD_DOCUMENTS],
                    title=[row["title"] for row in ODD_DOCUMENTS],
                    text=[row["text"] for row in ODD_DOCUMENTS],
                ),
                "queries": split(id=list(ODD_QUERIES), text=list(ODD_QUERIES.values())),
                "relevant_docs": ODD_QRELS,
                "top_ranked": None,
            }
        }
    }


class LocalReranking(Local, AbsTaskRetrieval):
    metadata = metadata("LocalReranking", "Reranking", "map_at_1000")
    data: ClassVar[Any] = {"default": {"test": ranking(CANDIDATES)}}


def vector(text: str) -> np.ndarray:
    """Always the same for a text; those of one label are a little alike."""
    noise = np.random.default_rng(list(text.encode())).standard_normal(24)
    return (noise + 1.5 * np.eye(24)[ord(text[-1]) % 24]).astype(np.float32)


class LookUp(mteb.models.abs_encoder.AbsEncoder):
    """An encoder for mteb whose vectors are those of `vector`, not of unit length."""

    mteb_model_meta = mteb.models.ModelMeta.create_empty()

    def __init__(self) -> None:
        self.model_prompts = None

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        return np.array([vector(text) for batch in inputs for text in batch["text"]])
