"""Explains the terms of a report, one line each, to readers who do not know them."""

from __future__ import annotations

from collections.abc import Iterable

from unmasked.recipe.schema import BEFORE, BIDIRECTIONAL

MEANINGS = {
    "causal": "The untouched decoder: a word's state depends only on the words before it. Mean, "
    "weighted mean and last token are three ways to make one vector of the states.",
    BIDIRECTIONAL: "The same decoder without its causal mask: every word sees the whole text.",
    BEFORE: "The encoder that the first stage began with, as it was given.",
    "mntp": "Masked next token prediction: the model guesses hidden words from both sides, and so "
    "learns to use the words to the right.",
    "merged": "The weights after the last stage, averaged with those before it.",
    "simcse": "Each text is encoded twice with different dropout; its two vectors are drawn "
    "together and away from those of other texts.",
    "supervised": "Queries are drawn towards the texts that answer them and away from others.",
    "ndcg@10": "How high the wanted documents rank among the first ten: 100 if they come first, "
    "in the best order; 0 if none is among the first ten.",
    "recall@1": "The share of the wanted documents that come first.",
    "recall@10": "The share of the wanted documents that are among the first ten.",
    "mrr@10": "One divided by the rank of the first wanted document; 0 beyond ten.",
    "map": "The precision at each wanted candidate, averaged: 100 if all wanted ones come first.",
    "spearman": "How well the order of the cosines agrees with that of people's scores: 100 is the "
    "same order, 0 no agreement.",
    "pearson": "How well the cosines agree with people's scores, up to a linear relation.",
    "max_ap": "How well similarity separates matches from other pairs, by the best of four "
    "similarities: 100 if every match is above every other pair.",
    "cosine_ap": "How well the cosine separates matches from other pairs.",
    "v_measure": "How well clusters that are found without the labels agree with the labels.",
    "accuracy": "The share of texts whose label a simple classifier gets right from the vectors.",
}
"""Term → explanation; metrics are named without the task."""


def meanings(stages: Iterable[str], metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Terms and explanations for a report: its stages, then its metrics ``TASK.METRIC``."""
    named = [stage if stage == BEFORE else stage.split("_")[0] for stage in stages]
    measured = [metric.rpartition(".")[2] for metric in metrics]
    return [
        (term, MEANINGS[term]) for term in dict.fromkeys([*named, *measured]) if term in MEANINGS
    ]
