"""Removes the files of another model from a folder that is overwritten.

A loader would read such files in addition to the new ones or instead of them: an adapter's
configuration, an older vocabulary, weights under another name. Files that no loader reads stay.
Cost: one listing of the folder.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_OF_MODULE = re.compile(r"[0-9]+_[A-Z]\w*$")
_READ_BY_LOADERS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*",
    "adapter_config.json", "adapter_model*", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.spm", "*.tiktoken", "chat_template*", "additional_chat_templates",
    "*processor_config.json", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json", "router_config.json", "modeling_*.py",
    "configuration_*.py", "tokenization_*.py", "llm2vec_config.json", "onnx", "openvino",
    "original", "attached", "*.onnx", "*.onnx_data", "openvino_model*", "quantize_config.json",
    "quant_config.json",
)  # fmt: skip


def remove_leftovers(path: Path, written: Path) -> None:
    """Remove the files and folders of an old model that a loader would read.

    Args:
        path: the folder that is replaced, if it exists.
        written: the new folder, complete.
    """
    if not path.is_dir():
        return
    modules = {old for old in path.iterdir() if old.is_dir() and _OF_MODULE.match(old.name)}
    found = {old for name in _READ_BY_LOADERS for old in path.glob(name)} | modules
    removed = []
    for old in sorted(found):
        new = written / old.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif not new.is_file():  # otherwise the new file replaces it
            old.unlink()
        if not new.exists():
            removed.append(old.name)
    if removed:
        logger.warning("%s: removed files of another model: %s", path, ", ".join(removed))
