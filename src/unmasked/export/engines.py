"""Runs exported encoders, to compare them: there is one `Engine` for each kind of folder.

An engine gets each text as its users would send it, without help for what its format cannot
express. The folder's `unmasked_export.json` names its format; a folder without that file is run by
stock sentence-transformers.

Shapes: N texts, B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmasked.checkpoint import loading
from unmasked.checkpoint.folder import SETTINGS_NAME, read_settings
from unmasked.checkpoint.location import locate
from unmasked.errors import MissingExtraError, ModelError, UnmaskedError, first_line, unknown
from unmasked.export.gguf_file import FILE
from unmasked.export.graph import FILES, load_graph
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.tokens import TextTokenizer

MANIFEST = "unmasked_export.json"
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Engine:
    """A program that computes vectors from a folder."""

    name: str
    vectors: Callable[[Pairs], np.ndarray]
    """Computes (N, D) vectors of N ``(instruction, text)`` pairs."""
    takes_empty: bool = True  # whether it has a vector for an empty text without an instruction


def engine_of(folder: Path) -> Engine:
    """The engine of a folder.

    Raises:
        ModelError: it is not a folder, its format is not known, or its engine cannot run it.
        MissingExtraError: its engine is not installed.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is neither a folder nor an address. Allowed: a folder of `unmasked export`, "
            "of a saved encoder, or http://HOST:PORT. Fix: check the name."
        )
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return stock_engine(folder)
    kind = json.loads(manifest.read_text(encoding="utf-8")).get("format", "")
    kinds: dict[str, Callable[[Path], Engine]] = {
        "onnx": partial(graph_engine, kind="onnx"),
        "openvino": partial(graph_engine, kind="openvino"),
        "gguf": llama_engine,
        "vllm": stock_engine,
        "tei": stock_engine,
    }
    if kind not in kinds:
        raise ModelError(unknown(f"format in {manifest}", kind, kinds))
    return kinds[kind](folder)


def saved_tokens(folder: Path) -> TextTokenizer:
    """The tokenizer of a saved folder; the folder needs no weights."""
    location = locate(folder)
    settings = read_settings(location.read_json(SETTINGS_NAME), {})
    eos = settings.pooling_mode == "eos_token"
    return TextTokenizer(
        prepare_tokenizer(loading.load_tokenizer(folder), append_eos=eos),
        settings.max_length,
        settings.doc_max_length,
        settings.skip_instruction,
        settings.template,
    )


@contextmanager
def _failures_of(engine: str) -> Iterator[None]:
    """Turn whatever an engine raises for a file that it cannot run into a `ModelError`."""
    try:
        yield
    except UnmaskedError:
        raise
    except Exception as error:  # each engine has errors of its own
        raise ModelError(
            f"{engine} cannot run the export ({first_line(error)}). Fix: export it again, without "
            "--opset, or to another engine."
        ) from error


def graph_engine(folder: Path, kind: str) -> Engine:
    """ONNX Runtime or OpenVINO."""
    name = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[kind]
    tokens = saved_tokens(folder)
    with _failures_of(name):
        vectors = load_graph(tokens, kind, folder / FILES[kind])
    return Engine(name, _failures_of(name)(vectors))


def llama_engine(folder: Path) -> Engine:
    """llama.cpp, with no settings but those of the file."""
    try:
        llama: Any = import_module("llama_cpp").Llama
    except ImportError as error:
        raise MissingExtraError("llama-cpp-python", "llama") from error
    tokens = saved_tokens(folder)
    options = {name: tokens.max_length for name in ("n_ctx", "n_batch", "n_ubatch")}
    options["n_threads"] = options["n_threads_batch"] = torch.get_num_threads()
    prefix = tokens.template.prefix

    def vectors(pairs: Pairs) -> np.ndarray:
        inputs = [prefix + tokens.join(instruction) + text for instruction, text in pairs]
        with (
            _failures_of("llama.cpp"),
            closing(llama(str(folder / FILE), embedding=True, verbose=False, **options)) as model,
        ):
            return np.asarray([model.embed(text) for text in inputs], np.float32)

    return Engine("llama.cpp", vectors, takes_empty=bool(tokens.prefix or tokens.suffix))


def stock_engine(folder: Path) -> Engine:
    """Stock sentence-transformers, with the instruction given as its prompt."""
    from sentence_transformers import SentenceTransformer

    if not (folder / "modules.json").is_file():
        raise ModelError(
            f"{folder} does not say how its vectors are pooled (there is no modules.json), like a "
            f"decoder. Fix: unmasked convert {shlex.quote(str(folder))} -o DIR, and name DIR."
        )
    try:
        model = SentenceTransformer(str(folder), trust_remote_code=False)
    except Exception as error:  # a broken file can raise any error
        raise locate(folder).unreadable(error) from error
    empty = model.prompts.get(model.default_prompt_name or "", "")

    def vectors(pairs: Pairs) -> np.ndarray:
        # A newline between instruction and text keeps the first word from merging with the prompt.
        prompts = [f"{i}\n" if i and not i[-1].isspace() else i for i, _ in pairs]
        # One text per batch, so that no padding is involved.
        rows = [
            model.encode([text], prompt=prompt or empty, show_progress_bar=False)[0]
            for prompt, (_, text) in zip(prompts, pairs, strict=True)
        ]
        return np.stack(rows)

    return Engine("sentence-transformers", vectors)
