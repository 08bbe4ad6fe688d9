"""An example of each kind of task file, for `unmasked evaluate --formats`.

`task_files` and `probe` read them; a test reads these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """An example of one kind of task."""

    kind: str  # what is measured
    given: str  # the argument of ``--tasks``
    files: dict[str, str]  # name → content, with tabs between columns


FORMATS = (
    Format(
        "similarity as judged by people (STS): spearman, pearson",
        "sts.tsv",
        {
            "sts.tsv": "score\tsentence1\tsentence2\n"
            "4.5\tA cat sleeps.\tA cat is asleep.\n"
            "0.5\tA cat sleeps.\tStocks fell on Monday.\n"
        },
    ),
    Format(
        "pairs that match (1) or do not (0): max_ap, cosine_ap",
        "pairs.tsv",
        {
            "pairs.tsv": "label\tsentence1\tsentence2\n"
            "1\tHow do I sort a list?\tSorting a list in Python\n"
            "0\tHow do I sort a list?\tHow old is the moon?\n"
        },
    ),
    Format(
        "clustering of labelled texts: v_measure",
        "topics.tsv",
        {"topics.tsv": "label\ttext\nsport\tThe match ended in a draw.\nmoney\tStocks fell.\n"},
    ),
    Format(
        "classification, with the file to train on beside it: accuracy",
        "intent_test.tsv",
        {
            "intent_train.tsv": "label\ttext\nsport\tThe match was drawn.\nmoney\tStocks fell.\n",
            "intent_test.tsv": "label\ttext\nsport\tShe won the race.\nmoney\tPrices rose.\n",
        },
    ),
    Format(
        "reranking, one query per line: map, mrr@10",
        "rank.jsonl",
        {
            "rank.jsonl": '{"query": "sort a list", "positive": ["use sorted()"], '
            '"negative": ["use len()", "use print()"]}\n'
            '{"query": "read a file", "positive": "use open()", "negative": "use sum()"}\n'
        },
    ),
    Format(
        "retrieval, a folder in the BEIR layout: ndcg@10, recall@1, recall@10, mrr@10",
        "law/",
        {
            "law/corpus.jsonl": '{"_id": "d1", "title": "Rent", "text": "Rent is due monthly."}\n'
            '{"_id": "d2", "title": "", "text": "A will needs two witnesses."}\n',
            "law/queries.jsonl": '{"_id": "q1", "text": "When is rent due?"}\n',
            "law/qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        },
    ),
    Format(
        "words and their labels, a blank line between sentences: accuracy of a linear probe",
        "words:pos_dev.tsv",
        {
            "pos_train.tsv": "The\tDET\ncat\tNOUN\n\nA\tDET\ndog\tNOUN\n",
            "pos_dev.tsv": "A\tDET\ncat\tNOUN\n\nThe\tDET\ndog\tNOUN\n",
        },
    ),
)
"""One example of each kind."""


def formats_text() -> str:
    """All examples, as text for the terminal."""
    parts = []
    for one in FORMATS:
        lines = [f"{one.kind}", f"  --tasks {one.given}"]
        for name, content in one.files.items():
            lines += [f"  {name}", *(f"    {line}" for line in content.splitlines())]
        parts.append("\n".join(lines))
    public = "public tasks and benchmarks of mteb by their names: --tasks STSBenchmark"
    return "\n\n".join([*parts, f"{public}\n\nColumns of a .tsv file are separated by tabs."])
