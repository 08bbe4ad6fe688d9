"""The files of another model in a folder or a repository that is overwritten.

A loader would read such files in addition to the new ones or instead of them: an adapter's
configuration, an older vocabulary, weights under another name. All other files belong to the user
and stay, so files are named here as models name them, never by a common word, and a folder is
removed only if nothing is left in it. Cost: a few listings of the folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

_SIGNS = {"modules.json": "", "adapter_config.json": "", "tokenizer_config.json": "",
          "config.json": "model_type"}  # fmt: skip
"""The files that show that a folder holds a model, with the key that they need for it."""
_WEIGHTS = (
    "model.safetensors", "model.*.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "model.*.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.*.bin", "pytorch_model-*-of-*.bin", "pytorch_model*.bin.index.json",
    "tf_model*.h5", "tf_model.h5.index.json", "flax_model*.msgpack",
    "flax_model.msgpack.index.json", "adapter_model.safetensors", "adapter_model.bin",
    "consolidated*.safetensors",
)  # fmt: skip
_CONFIGS = (
    "config.json", "generation_config.json", "adapter_config.json", "quantize_config.json",
    "quant_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "router_config.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "llm2vec_config.json",
)  # fmt: skip
_TOKENIZER = (
    "tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer_config.json", "tokenizer.model",
    "tokenizer.model.v[0-9]*", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "*.spm", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
_GRAPHS = (
    "*.onnx", "*.onnx_data", "*.onnx.data", "openvino_model*.xml", "openvino_model*.bin",
)  # fmt: skip
_OF_MODELS = (*_WEIGHTS, *_CONFIGS, *_TOKENIZER, *_GRAPHS)
_MODULES = (
    "Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "Router", "Asym", "CNN",
    "LSTM", "BoW", "WordEmbeddings", "WordWeights", "WeightedLayerPooling", "StaticEmbedding",
    "SparseStaticEmbedding", "SpladePooling", "SparseAutoEncoder", "MLMTransformer", "CLIPModel",
)  # fmt: skip
"""The classes of sentence-transformers after which it names the folders of modules."""
_OF_MODULE = re.compile(rf"[0-9]+_(?:{'|'.join(_MODULES)})")
_WITH_FOLDER = {
    "onnx": _GRAPHS,
    "openvino": _GRAPHS,
    "original": ("consolidated*.pth", "consolidated*.safetensors"),
    "attached": ("adapters.safetensors",),
    "additional_chat_templates": ("*.jinja",),
}
"""Folders of a model, each with the files without which it is a folder of the user."""
_BESIDE = {"original": ("params.json", "tokenizer.model")}
"""Further files of such a folder; in the others, those of a model."""

READ_BY_LOADERS = (
    *_OF_MODELS,
    *(f"{name}/{pattern}" for name, patterns in _WITH_FOLDER.items() for pattern in patterns),
)
"""What loaders look for in a repository, as patterns of paths. Modules are not among them: loaders
read those that `modules.json` names."""


def find_leftovers(path: Path, written: Path) -> list[Path]:
    """The files of an old model that a loader would read and that the new one does not replace.

    Args:
        path: the folder that is replaced, if it exists.
        written: the new folder, complete.

    Returns:
        Paths in `path`, sorted; none if it does not hold a model.
    """
    if not path.is_dir() or not any(_shows_model(path / sign, key) for sign, key in _SIGNS.items()):
        return []
    found = {*_matching(path, _OF_MODELS), *_remote_code(path)}
    for folder in _module_folders(path):
        found.update(_matching(folder, _OF_MODELS))
    for name, needed in _WITH_FOLDER.items():
        folder = path / name
        if _matching(folder, needed):
            # The files of a linked folder are elsewhere, and perhaps of another model: only the
            # link is removed.
            others = _BESIDE.get(name, _OF_MODELS)
            inside = _matching(folder, (*needed, *others))
            found.update([folder] if folder.is_symlink() else inside)
    return sorted(file for file in found if not (written / file.relative_to(path)).is_file())


def remove_leftovers(path: Path, leftovers: list[Path]) -> None:
    """Remove what `find_leftovers` has found in `path`, and the folders that become empty."""
    for file in leftovers:
        file.unlink(missing_ok=True)
        for folder in file.parents:
            if folder == path or any(folder.iterdir()):
                break
            folder.rmdir()
    if leftovers:
        names = ", ".join(file.relative_to(path).as_posix() for file in leftovers)
        logger.warning("%s: removed files of another model: %s", path, names)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files in a folder with such a name; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return [file for name in patterns for file in folder.glob(name) if not file.is_dir()]


def _shows_model(file: Path, key: str) -> bool:
    content = _content(file)
    return isinstance(content, dict | list) and (not key or key in content)


def _module_folders(path: Path) -> Iterator[Path]:
    """The folders of modules: those that `modules.json` names, and those with a module's name."""
    rows = _content(path / "modules.json")
    named = [row.get("path") for row in rows or [] if isinstance(row, dict)]
    found = {PurePosixPath(name) for name in named if isinstance(name, str) and name}
    found |= {PurePosixPath(old.name) for old in path.iterdir() if _OF_MODULE.fullmatch(old.name)}
    for folder in found:
        if not folder.is_absolute() and ".." not in folder.parts:
            yield path / folder


def _remote_code(path: Path) -> Iterator[Path]:
    """The Python files that the configs of the old model name; others are programs of the user."""
    for config in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        content = _content(path / config)
        stated = content.get("auto_map") if isinstance(content, dict) else None
        for reference in stated.values() if isinstance(stated, dict) else ():
            for name in reference if isinstance(reference, list) else [reference]:
                file = path / f"{str(name).partition('.')[0]}.py"
                if file.parent == path and file.is_file():
                    yield file


def _content(file: Path) -> Any:
    """The JSON in a file; None if there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
