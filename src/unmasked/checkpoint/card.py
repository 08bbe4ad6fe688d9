"""The model card: README.md of a saved folder, in the format of sentence-transformers and the hub.

The front matter (library, tags, base model, data, scores as ``model-index``) is for the hub; the
text below it is for people. Cost: importing huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yaml import YAMLError

from unmasked import __version__
from unmasked.errors import origin_of_package

CITATION = """## Citation

```bibtex
@inproceedings{llm2vec,
    title = {LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders},
    author = {BehnamGhader, Parishad and Adlakha, Vaibhav and Mosbach, Marius and Bahdanau, Dzmitry
              and Chapados, Nicolas and Reddy, Siva},
    booktitle = {COLM},
    year = {2024},
    url = {https://arxiv.org/abs/2404.05961},
}
```
"""
NEEDS = """\
This needs transformers 5.2 or later and sentence-transformers 5.2 or later; older ones stop
with an error, because they would compute causally.
"""
DIFFERENCES = """
Where this loader differs from `unmasked`, which made the model:

- A prompt should end in a newline, or in a colon without a space after it: after a space, the first
  word of the text merges with the prompt, and this loader then leaves it out of the vector. The
  same happens to a text that begins with white space.
- An empty text has a vector of zeros, so that its cosine to anything is 0; `unmasked` gives it the
  vector of its context.
- Texts without a prompt get the default prompt, one character that the tokenizer removes, so that
  BOS is left out of the vector; the loader logs that. A call with `prompt=""`, which some
  frameworks make, switches that off, and BOS is averaged in: leave `prompt` out, or pass
  `prompt_name="document"`. A framework that sets empty prompts of its own, as LlamaIndex does,
  needs the ones under `prompts` in `config_sentence_transformers.json` instead.
"""
OWN_TOKENS, ALL_TOKENS = "own tokens, without BOS and prompt", "tokens, BOS and prompt included"
PLACEHOLDER = "sentence_transformers_model_id"
"""Placeholder for the name of a model without one; `SentenceTransformer` replaces it later."""
TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "llm2vec", "unmasked")
TRAINED_ON = "training_datasets"
"""The key of the front matter that names all data sets, also those that are not on the hub."""
LIBRARIES = ("sentence-transformers", "transformers", "torch", "peft")
_DATA = {".csv", ".gz", ".jsonl", ".parquet", ".tsv", ".txt", ".zst"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Card:
    """The content of a model card beyond the settings.

    Attributes:
        base: hub name or folder of the decoder.
        bidirectional: the proof, in a sentence.
        sections: title → Markdown, put after the rest.
        datasets: the training data, hub names or files.
        stages: ``{"name": ..., "scores": {"TASK.METRIC": fraction}}``, in order; the last one is
            the model itself.
        name: the name of this model, if it has one.
    """

    base: str = "a decoder-only language model"
    bidirectional: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    stages: Sequence[Mapping[str, object]] = ()
    name: str | None = None


def versions() -> dict[str, str]:
    """This package and the libraries that a model depends on, with their versions."""
    return {"unmasked": __version__, **{name: version(name) for name in LIBRARIES}}


def render(
    card: Card,
    pooling: str,
    width: int,
    limit: int,
    similarity: str = "cosine",
    text_limit: int | None = None,
    task_limits: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """The whole README.md.

    Args:
        card: the content.
        pooling: how token states become a vector, from `pooling_in_words`.
        width: D, the dimension of a vector.
        limit: number of tokens at which an input is cut.
        similarity: how vectors are compared: ``cosine``, ``dot``, ``euclidean``, ``manhattan``.
        text_limit: number of tokens at which a text is cut without its prompt, if that is less.
        task_limits: limits for queries and documents, by their name in the stock settings.
    """
    sections = {**card.sections, "Scores": _scores(card)} if card.stages else card.sections
    further = "\n".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
    name = _public_name(card.base)
    base = f"[{name}](https://huggingface.co/{name})" if name else Path(card.base).name or card.base
    data = "".join(f"\n    - {name}" for name in names_shown(card.datasets))
    libraries = "\n".join(f"- {name}: {number}" for name, number in versions().items())
    tasks = "".join(_task_limit(*item) for item in task_limits.items())
    origin = origin_of_package().removeprefix("git+")
    maker = f"[unmasked]({origin})" if origin.startswith("http") else "unmasked"
    compared = {"cosine": "Cosine Similarity", "dot": "Dot Product"}.get(
        similarity, f"{similarity.capitalize()} Distance"
    )
    return f"""---
{_front_matter(card)}
---

# {card.name or f"Text encoder based on {name or base}"}

This is a [sentence-transformers](https://www.SBERT.net) model: {base}, a decoder-only language
model, with its causal mask removed (LLM2Vec), made with {maker}.
It maps a text to {width} numbers, to be compared by {similarity}: for search, clustering,
classification.

## Model Details

- **Model Type:** Sentence Transformer
- **Base model:** {base}
- **Maximum Sequence Length:** {limit} tokens{tasks}
- **Output Dimensionality:** {width} dimensions
- **Similarity Function:** {compared}
- **Pooling:** {pooling}
- **Attention:** {card.bidirectional or "not examined"}
- **Training Data:** {data or "none"}

## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{card.name or PLACEHOLDER}")
vectors = model.encode(["a text", "another text"])
print(model.similarity(vectors, vectors))
```

{NEEDS}{DIFFERENCES}{_cut(limit, text_limit)}{further}

## Framework Versions

{libraries}

{CITATION}"""


def pooling_in_words(mode: str, skip_instruction: bool) -> str:
    """A pooling mode, and over which tokens it averages if it does."""
    own, every = f"the text's {OWN_TOKENS}", f"the text's {ALL_TOKENS}"
    averages = mode in ("mean", "weighted_mean")
    return f"`{mode}`" + (f" over {own if skip_instruction else every}" if averages else "")


def front_matter(file: str | Path | None) -> dict[str, Any]:
    """The facts at the head of a model card; empty without a card, or if it cannot be read."""
    from huggingface_hub import metadata_load

    with suppress(OSError, ValueError, YAMLError):  # other programs and people write cards, too
        return (metadata_load(file) if file else None) or {}
    return {}


def _task_limit(name: str, number: int) -> str:
    kind = name.removesuffix("_length").capitalize()
    return f"\n    - **Maximum {kind} Length:** {number} tokens"


def _cut(limit: int, text_limit: int | None) -> str:
    if text_limit is None or text_limit >= limit:
        return ""
    return (
        f"- A long text is cut at {limit} tokens together with its prompt; `unmasked` cuts the "
        f"text alone, at {text_limit} tokens.\n"
    )


def _front_matter(card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    scores = card.stages[-1]["scores"] if card.stages else {}
    assert isinstance(scores, dict)
    results = [
        EvalResult(
            task_type="sentence-similarity",
            task_name="Sentence Similarity",
            dataset_type=task,
            dataset_name=task,
            metric_type=_metric_type(metric),
            metric_name=metric,
            metric_value=float(value),
        )
        for (task, _, metric), value in ((key.rpartition("."), v) for key, v in scores.items())
    ]
    named = Path(card.base).name or card.base
    trained: dict[str, Any] = {TRAINED_ON: names_shown(card.datasets)} if card.datasets else {}
    data = ModelCardData(
        base_model=_public_name(card.base),
        datasets=[given for given in card.datasets if _public_name(given)] or None,
        eval_results=results or None,
        library_name="sentence-transformers",
        model_name=(card.name or f"Text encoder based on {named}") if results else None,
        pipeline_tag="sentence-similarity",
        tags=list(TAGS),
        **trained,
    )
    return str(data.to_yaml()).strip()


def _metric_type(metric: str) -> str:
    """A metric's name as the hub allows it: letters, digits and underscores."""
    return re.sub(r"\W+", "_", metric.replace("@", "_at_"))


def _public_name(given: str) -> str | None:
    """The name if it can be a hub name; None for a file or folder of this machine."""
    local = Path(given).exists() or Path(given).suffix in _DATA
    return given if _HUB_NAME.fullmatch(given) and not local else None


def names_shown(datasets: Sequence[str]) -> list[str]:
    """Names of data sets for the public: hub names, and files without their folders."""
    names = (_public_name(given) or Path(given).name for given in datasets)
    return list(dict.fromkeys(names))


def _scores(card: Card) -> str:
    """A table of the scores times 100: a row per stage, a column per metric."""
    rows = [(str(stage["name"]), stage["scores"]) for stage in card.stages]
    first = rows[0][1]
    assert isinstance(first, dict)
    lines = ["| stage | " + " | ".join(first) + " |", "|---" + "|---:" * len(first) + "|"]
    for name, scores in rows:
        assert isinstance(scores, dict)
        cells = (f"{100 * float(scores[metric]):.2f}" for metric in first)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nTimes 100. The last stage is this model."
