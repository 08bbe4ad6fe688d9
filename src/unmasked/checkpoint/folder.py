"""The saved folder: plain files that stock loaders read, without this package or remote code.

It is written for transformers (`AutoModel`, still bidirectional), sentence-transformers, and
servers that parse the older sentence-transformers schema. The compact schema that version 6 writes
makes some servers silently pool the wrong token, so the files here follow the older one.

    config.json, model.safetensors       the transformer, `is_causal: false`
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling/config.json, sentence_bert_config.json
    config_sentence_transformers.json    prompts; an empty one is `tokens.MARK`, see there
    llm2vec_config.json                  what only this package and the original read
    README.md                            model card

A folder is written aside and moved into place, so an interrupted save leaves the old one whole.
Cost: the weights are written once; the tokenizer is loaded twice to see what `AutoTokenizer` makes
of it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from unmasked.checkpoint.card import Card, render
from unmasked.checkpoint.weights import without_bars
from unmasked.errors import ModelError
from unmasked.files.writing import folder_aside
from unmasked.mask.opening import NATIVE_KEY
from unmasked.text.templates import PLAIN, Template, read_template
from unmasked.text.tokens import MARK

logger = logging.getLogger(__name__)

SETTINGS_NAME = "llm2vec_config.json"
PROMPTS_NAME = "config_sentence_transformers.json"
GENERIC_TOKENIZER = "glm"
"""A model type whose tokenizer is, in transformers, the generic class: tokenizer.json as it is."""


@dataclass(frozen=True)
class Settings:
    """What a folder says about turning texts into vectors, in `llm2vec_config.json`.

    The first four keys are those of the original package; its folders have no ``template``.

    Attributes:
        pooling_mode: how token states become a vector.
        max_length: maximum number of tokens of an input, instruction and special tokens included.
        doc_max_length: maximum number of tokens of a text; None for whatever `max_length` leaves.
        skip_instruction: whether only the tokens of the text are pooled.
        template: what stands around a text.
        compat: name of the rules by which another package found and cut the text; None for ours.
    """

    pooling_mode: str = "mean"
    max_length: int = 512
    doc_max_length: int | None = None
    skip_instruction: bool = True
    template: Template = PLAIN
    compat: str | None = None


def write_folder(
    path: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    stock_pooling: Mapping[str, Any],
    prompts: dict[str, str],
    fixed_tokens: int,
    needs_eager: bool = False,
    card: Card | None = None,
) -> None:
    """Write a whole model folder, or replace one.

    Args:
        path: folder to write.
        model: bare transformer, adapters merged.
        tokenizer: as made by `tokens.prepare_tokenizer`.
        settings: pooling and lengths.
        stock_pooling: ``pooling_mode`` and ``include_prompt`` of the stock `Pooling` module.
        prompts: name → prompt; an empty prompt leaves BOS out of pooling all the same.
        fixed_tokens: number of tokens of an input that are not its text (BOS, EOS).
        needs_eager: stock loaders must use eager attention for this family.
        card: what the README says.
    """
    with folder_aside(Path(path)) as folder:
        with without_bars():
            model.save_pretrained(folder)  # type: ignore[operator]
        for weights in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", weights)  # safetensors makes them private
        native = hasattr(model.config, NATIVE_KEY)
        _complete_config(folder / "config.json", native, needs_eager)
        limit = settings.max_length
        if settings.doc_max_length is not None:
            limit = min(limit, settings.doc_max_length + fixed_tokens)
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(folder)
        width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        _write_json(folder / "modules.json", _modules())
        (folder / "1_Pooling").mkdir()
        _write_json(folder / "1_Pooling" / "config.json", _pooling(stock_pooling, width))
        loading = {"max_seq_length": limit, "do_lower_case": False}
        _write_json(folder / "sentence_bert_config.json", loading | _tokenizer_args(folder))
        _write_json(folder / PROMPTS_NAME, _prompts(prompts, _empty_prompt(tokenizer)))
        _write_json(folder / SETTINGS_NAME, asdict(settings))
        text = render(card or Card(), settings.pooling_mode, width, limit)
        (folder / "README.md").write_text(text, encoding="utf-8")


def read_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Every setting as given, else as saved, else the default.

    Args:
        saved: content of a `llm2vec_config.json`.
        given: by name; what is None, or ``...`` for `doc_max_length`, was not given.

    Raises:
        ModelError: a template that does not exist.
    """
    names = [field.name for field in fields(Settings)]
    found = {name: saved[name] for name in names if name in saved}
    for name, value in given.items():
        if value is not (... if name == "doc_max_length" else None):
            found[name] = value
    return Settings(**found | {"template": read_template(found.get("template"))})


def check_length(asked: int | None, config: PretrainedConfig) -> None:
    """Refuse a length that was asked for and is beyond the positions of a model.

    The default stands for what the model has, and is not refused.

    Raises:
        ModelError: it is.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked and most and asked > most and asked != Settings.max_length:
        raise ModelError(
            f"max_length {asked:,}: this model has {most:,} positions, and was trained on no "
            f"longer input. Fix: max_length={most} (--max-length {most}), or less."
        )


def within_positions(settings: Settings, positions: int | None) -> Settings:
    """Settings whose `max_length` a model with so many positions can take (None: any number)."""
    if positions is None or settings.max_length <= positions:
        return settings
    asked = settings.max_length != Settings().max_length
    logger.log(
        logging.WARNING if asked else logging.INFO,
        "max_length %d: this model has %d positions, texts are cut there.",
        settings.max_length,
        positions,
    )
    return replace(settings, max_length=positions)


def read_prompts(saved: dict[str, str], template: Template = PLAIN) -> dict[str, str]:
    """The prompts as a folder has them, without the template and the mark for an empty one."""
    prompts = {
        name: (prompt or "").removeprefix(MARK).removeprefix(template.prefix)
        for name, prompt in saved.items()
    }
    return {name: prompt for name, prompt in prompts.items() if name != "default"}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete_config(path: Path, has_native_key: bool, needs_eager: bool) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["use_cache"] = False
    if config.get("is_causal") is False and not has_native_key:
        config[NATIVE_KEY] = True  # what text-embeddings-inference reads; others ignore it
    if needs_eager:
        config["attn_implementation"] = "eager"
    _write_json(path, config)


def _tokenizer_args(folder: Path) -> dict[str, Any]:
    """What stock sentence-transformers must be told to load the tokenizer as it was saved.

    For a few families (`qwen2`) `AutoTokenizer` builds a class of its own from the vocabulary and
    drops the saved normalizer, so that it would keep `MARK`.
    """
    probe = MARK + "a"
    saved = PreTrainedTokenizerFast.from_pretrained(folder)
    if AutoTokenizer.from_pretrained(folder)(probe)["input_ids"] == saved(probe)["input_ids"]:
        return {}
    return {"tokenizer_args": {"tokenizer_type": GENERIC_TOKENIZER}}


def _modules() -> list[dict[str, Any]]:
    names = (("Transformer", ""), ("Pooling", "1_Pooling"))
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(names)
    ]


def _pooling(stock: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The stock pooling in the older schema, one flag per mode."""
    flags = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    return {
        "word_embedding_dimension": width,
        **{flag: stock["pooling_mode"] == mode for flag, mode in flags.items()},
        "pooling_mode": stock["pooling_mode"],
        "include_prompt": stock["include_prompt"],
    }


def _empty_prompt(tokenizer: PreTrainedTokenizerFast) -> str:
    """`MARK`, if there is a BOS to be left out of pooling: some tokenizer classes keep the mark."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return "" if tokenizer("a")["input_ids"][:1] == plain[:1] else MARK


def _prompts(prompts: dict[str, str], empty: str) -> dict[str, Any]:
    named = {"default": "", "query": "", "document": "", **prompts}
    return {
        "__version__": {
            "sentence_transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__.split("+")[0],
        },
        "model_type": "SentenceTransformer",
        "prompts": {name: prompt or empty for name, prompt in named.items()},
        "default_prompt_name": "default",
        "similarity_fn_name": "cosine",
    }
