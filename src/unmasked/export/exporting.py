"""`export_model` writes an encoder for another engine, compares the vectors, or leaves nothing.

The new folder begins as a saved encoder and keeps those of its files that the engine needs. In the
end, the fixed texts of `parity` are encoded by the engine and by torch, and the result is written
to `unmasked_export.json` in the folder. A folder whose vectors differ is only kept if the caller
accepts that.

Cost: the model is in memory twice, and three times for a moment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Normalize

from unmasked.checkpoint import loading
from unmasked.checkpoint.card import ALL_TOKENS, NEEDS, OWN_TOKENS
from unmasked.checkpoint.folder import STOPS_OLDER
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import MissingExtraError, ModelError, UnmaskedError, unknown
from unmasked.export.engines import MANIFEST, Engine, engine_of
from unmasked.export.faults import Reader, Reading
from unmasked.export.gguf_file import FILE, write_gguf
from unmasked.export.graph import FILES, write_graph
from unmasked.export.parity import LIMIT, LIMIT_OF_8_BITS, TEXTS, Parity, compare_vectors, shown
from unmasked.export.served import check_keys
from unmasked.files.writing import folder_aside

Format = Literal["onnx", "openvino", "gguf", "vllm", "tei"]
WEIGHTS: dict[str, tuple[str, ...]] = {
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "int8"),
    "gguf": ("float16", "int8"),
    "vllm": ("bfloat16", "float16", "float32"),
    "tei": ("float16", "float32"),
}
"""The number types that each format can have, its default first."""
POOLS_ALL = ("gguf", "vllm", "tei")  # formats whose engines pool every token of an input


LLAMA_USAGE = """## Usage

```python
from llama_cpp import Llama  # pip install llama-cpp-python

sizes = {{name: {length} for name in ("n_ctx", "n_batch", "n_ubatch")}}  # most tokens
model = Llama("{file}", embedding=True, **sizes)
vectors = [model.embed(text) for text in ["a text", "another text"]]
```
"""


class DifferentVectorsError(UnmaskedError):
    """An export gives other vectors than torch, or could not be compared."""


@dataclass(frozen=True)
class Exported:
    """An export."""

    folder: Path
    engine: str  # the engine whose vectors were compared
    weights: str  # the number type of its weights
    parity: Parity | None
    """Its vectors compared with those of torch; None if the engine is not installed."""
    notes: tuple[str, ...]  # sentences about what the engine cannot express

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"engine": self.engine, "weights": self.weights, "notes": list(self.notes)}
        return found | (self.parity.as_dict() if self.parity else {"least_cosine": None})


def export_model(
    model: str | Path,
    to: Format,
    output: Path,
    weights: str | None = None,
    opset: int | None = None,
    accept: bool = False,
) -> Exported:
    """Write an encoder for another engine to a new folder, and compare its vectors with torch's.

    Args:
        model: folder or hub name of an encoder.
        weights: one of the format's `WEIGHTS`; None for the first of them.
        opset: the ONNX opset; None for the newest that the converter knows.
        accept: keep the folder even if the vectors differ or cannot be compared.

    Raises:
        ModelError: the encoder cannot be loaded, or the engine cannot compute it.
        MissingExtraError: the extra ``export`` is not installed.
        DifferentVectorsError: the engine gives other vectors, or cannot be run here.
    """
    if to not in get_args(Format):
        raise ModelError(unknown("format", to, get_args(Format)))
    weights = weights or WEIGHTS[to][0]
    if weights not in WEIGHTS[to]:
        raise ModelError(unknown(f"weights for {to}", weights, WEIGHTS[to]))
    encoder = LLM2Vec.from_pretrained(model, dtype="float32", device="cpu", allow_partial=True)
    if encoder.settings.compat is not None:
        raise ModelError(
            f"{model} finds texts by the rules of {encoder.settings.compat}, which no engine "
            "implements. Fix: load it without compat, save it, and export that folder."
        )
    with folder_aside(output) as folder:
        if to in ("vllm", "tei"):
            encoder.to(getattr(torch, weights))
        encoder.save(folder)
        if to in ("vllm", "tei"):
            check_keys(folder, to, encoder.settings.pooling_mode)
            encoder.to(torch.float32)
        else:
            _convert(encoder, to, folder, weights, opset)
        _describe(encoder, folder, to)
        manifest = {"format": to, "weights": weights}  # by which `engine_of` finds the engine
        (folder / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        found = _compared(encoder, to, folder, weights)
        if not accept:
            _require_parity(found)
        manifest |= found.as_dict() | {"accepted": accept}
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return replace(found, folder=output)


def _convert(encoder: LLM2Vec, to: Any, folder: Path, weights: Any, opset: int | None) -> None:
    """Replace the weights in a saved folder by the engine's file."""
    # Loaded again, because the encoder's own transformer runs packed attention.
    model, _ = loading.load_transformer(loading.find(folder), torch.float32, allow_partial=True)
    tokens, mode = encoder.backbone.tokens, encoder.settings.pooling_mode
    if to == "gguf":
        if others := [m for m in list(encoder)[2:] if not isinstance(m, Normalize)]:
            said = f"llama.cpp has no module {type(others[0]).__name__} after the pooling"
            raise ModelError(f"{said}. Fix: --to onnx.")
        write_gguf(folder, model, tokens, mode, weights)
    else:
        behind = list(encoder)[2:]
        write_graph(tokens, mode, model, to, folder, weights, opset, behind)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()


def _describe(encoder: LLM2Vec, folder: Path, to: str) -> None:
    """Change what the saved folder says of itself to what is true of the export."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    if to == "gguf":
        usage = LLAMA_USAGE.format(file=FILE, length=encoder.backbone.tokens.max_length)
        text = re.sub(r"(?s)## Usage\n.*?(?=\n## )", usage, text)
        text = text.replace(OWN_TOKENS, ALL_TOKENS)
        text = re.sub(r"\[sentence-transformers\]\(.*\) model:", "llama.cpp file:", text)
        text = text.replace("Type:** Sentence Transformer", "Type:** GGUF, for llama.cpp")
        text = re.sub(r"library_name: .*\n|- sentence-transformers\n", "", text)
    elif to in FILES:
        text = re.sub(r"(SentenceTransformer\(\".*)\)\n", rf'\1, backend="{to}")\n', text)
        text = text.replace(NEEDS, f"This needs `pip install 'sentence-transformers[{to}]'`.\n")
        # A graph has its mask inside, and the packages that run one may need transformers 4.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop(STOPS_OLDER, None)
        written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(written, encoding="utf-8")
    if notes := "".join(f"- {note}.\n" for note in inexpressible(encoder, to)):
        section = f"## What {to} cannot express\n\n{notes}\n## Framework Versions"
        text = text.replace("## Framework Versions", section)
    card.write_text(text, encoding="utf-8")


def _compared(encoder: LLM2Vec, to: str, folder: Path, weights: str) -> Exported:
    """Encode the fixed texts with the engine and with torch, and compare the vectors."""
    notes = list(inexpressible(encoder, to))
    limit = LIMIT_OF_8_BITS if weights == "int8" else LIMIT
    numbers = [*range(len(TEXTS))]
    try:
        engine = _by_rules(encoder, to, folder) if to in ("vllm", "tei") else engine_of(folder)
    except MissingExtraError as error:
        return Exported(folder, to, weights, None, (*notes, str(error)))
    if not engine.takes_empty:
        numbers.remove(TEXTS.index(("", "")))
        notes.append(f"{engine.name} has no vector for an empty text: it has no token there")
    theirs = engine.vectors([TEXTS[n] for n in numbers])
    ours = encoder.encode([list(TEXTS[n]) for n in numbers])
    parity = compare_vectors(ours, theirs, limit, numbers)
    return Exported(folder, engine.name, weights, parity, tuple(notes))


def _by_rules(encoder: LLM2Vec, to: str, folder: Path) -> Engine:
    """An `Engine` that computes by their rules what vLLM or TEI would, with the same weights."""
    pooled = "everything" if encoder.settings.skip_instruction else "text"
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    reading = Reading(pooled=pooled, dtype="" if dtype == "float32" else str(dtype))

    def vectors(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return Reader(encoder, str(folder), [list(pair) for pair in pairs]).vectors(reading)

    return Engine(f"{to} (by its rules, it is not run here)", vectors)


def inexpressible(encoder: LLM2Vec, to: str) -> list[str]:
    """Sentences about what an engine's format cannot express of an encoder."""
    tokens, found = encoder.backbone.tokens, []
    if to in POOLS_ALL and tokens.skip_instruction:
        pooled = ["the instruction", *(["BOS"] if tokens.prefix else [])]
        found.append(
            f"{to} pools {' and '.join(pooled)} with the text, but this encoder does not. A model "
            "trained with model.include_instruction=true gives the same vectors there"
        )
    if tokens.template.suffix and to == "gguf":
        found.append(
            f"the template ends every text with {tokens.template.suffix!r}, which llama.cpp does "
            "not add: send it with every text"
        )
    if tokens.template.prefix:
        found.append(
            f"the template begins every input with {tokens.template.prefix!r}, which is part of "
            "every saved prompt: send it to programs that do not read saved prompts"
        )
    if tokens.doc_max_length is not None:
        found.append(
            f"a text is cut after {tokens.doc_max_length} tokens here, but together with its "
            "instruction there"
        )
    return found


def _require_parity(found: Exported) -> None:
    """Raise `DifferentVectorsError` unless the vectors were compared and are the same."""
    if found.parity is not None and found.parity.same:
        return
    if found.parity is None:  # the last note says how to install the engine
        raise DifferentVectorsError(
            f"{found.engine} could not be compared: {found.notes[-1]}, or --accept, to keep the "
            "export all the same."
        )
    notes = "".join(f" Note: {note.rstrip('.')}." for note in found.notes)
    low = min(zip(found.parity.cosines, found.parity.texts, strict=True))[1]
    raise DifferentVectorsError(
        f"{found.engine} gives other vectors: least cosine {found.parity.least:.6f}, allowed "
        f"{found.parity.limit} (lowest: {shown(low)}).{notes} "
        "Fix: --accept, to keep the export all the same."
    )
