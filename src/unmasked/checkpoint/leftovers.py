"""What another model has left in a folder that is written again.

A loader would read such files beside, or instead of, those that were written: an adapter's
configuration, an older vocabulary, the weights under another name. Files that no loader reads stay.
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
    """Remove from a folder what a loader would read beside, or instead of, what was written.

    Args:
        path: the folder that is replaced, if it exists.
        written: the new one, complete.
    """
    if not path.is_dir():
        return
    inside = [place for place in path.iterdir() if place.is_dir() and _OF_MODULE.match(place.name)]
    found = {place for name in _READ_BY_LOADERS for place in path.glob(name)} | {*inside}
    removed = []
    for place in sorted(found):
        new = written / place.name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif not new.is_file():
            place.unlink()
        if not new.exists():
            removed.append(place.name)
    if removed:
        logger.warning("%s: removed what another model had left: %s", path, ", ".join(removed))
