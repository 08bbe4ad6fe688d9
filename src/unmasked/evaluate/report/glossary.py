"""What the words of a report mean, a line each, for a reader who meets them for the first time."""

from __future__ import annotations

from collections.abc import Iterable

from unmasked.recipe.schema import BEFORE, BIDIRECTIONAL

MEANINGS = {
    "causal": "The decoder as it was: a word's state knows only the words before it. Mean, "
    "weighted mean and last token are three ways to make one vector of the states.",
    BIDIRECTIONAL: "The same decoder without its causal mask: every word sees the whole text.",
    BEFORE: "What the first stage began with, as it was given.",
    "mntp": "Masked next token prediction: the model guesses hidden words from both sides, and so "
    "learns to use what it now sees.",
    "merged": "The weights after the last stage, mixed with those that it began with.",
    "simcse": "Each text is encoded twice with different dropout; its two vectors are drawn "
    "together and away from those of other texts.",
    "supervised": "Queries are drawn towards the texts that answer them and away from others.",
    "ndcg@10": "How high the wanted documents stand among the first ten: 100 if they come first, "
    "in the best order; 0 if none is there.",
    "recall@1": "The share of the wanted documents that come first.",
    "recall@10": "The share of the wanted documents that are among the first ten.",
    "mrr@10": "One divided by the rank of the first wanted document; 0 beyond ten.",
    "map": "The precision at each wanted candidate, averaged: 100 if all wanted ones come first.",
    "spearman": "How well the order of the cosines agrees with that of people's scores: 100 is the "
    "same order, 0 no agreement.",
    "pearson": "How well the cosines follow people's scores on a straight line.",
    "max_ap": "How well a similarity tells matches from other pairs, by the best of four "
    "similarities: 100 if every match is above every other pair.",
    "cosine_ap": "How well the cosine tells matches from other pairs.",
    "v_measure": "How well groups that are found without the labels agree with the labels.",
    "accuracy": "The share of texts whose label a simple classifier gets right from the vectors.",
}
"""Term → sentence; of metrics by their names without the task."""


def meanings(stages: Iterable[str], metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Term and sentence for what a report shows: its stages, then the metrics ``TASK.METRIC``."""
    named = [stage if stage == BEFORE else stage.split("_")[0] for stage in stages]
    measured = [metric.rpartition(".")[2] for metric in metrics]
    return [
        (term, MEANINGS[term]) for term in dict.fromkeys([*named, *measured]) if term in MEANINGS
    ]
