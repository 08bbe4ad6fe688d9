"""The saved folder: plain files that stock loaders read, without this package or remote code.

It is written for transformers (`AutoModel`, still bidirectional), sentence-transformers, and
servers that parse the older sentence-transformers schema. With the compact schema that version 6
writes, some servers silently pool the wrong token, so the files here follow the older one.

    config.json, model.safetensors       the transformer, `is_causal: false`
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling/config.json, sentence_bert_config.json, 2_Normalize/, 2_Dense/ ...
    config_sentence_transformers.json    prompts; an empty one is `special_tokens.MARK`, see there
    attached/                            adapters that were attached, to continue training them
    llm2vec_config.json                  settings that only this package and the original read
    README.md                            model card

A folder is written next to the old one and then moved into place, so an interrupted save leaves the
old one whole. Files of another model that a loader would read are removed last (`leftovers`).
Cost: the weights are written once; the tokenizer is loaded twice to see how `AutoTokenizer` loads
it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sentence_transformers
import torch
import transformers
from sentence_transformers.util import import_module_class
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unmasked.checkpoint.adapters import write_attached
from unmasked.checkpoint.card import Card, pooling_in_words, render
from unmasked.checkpoint.leftovers import find_leftovers, remove_leftovers
from unmasked.checkpoint.weights import share_weights, without_bars
from unmasked.errors import ModelError
from unmasked.files.writing import folder_aside
from unmasked.mask.opening import NATIVE_KEY
from unmasked.text.inputs import is_count
from unmasked.text.special_tokens import MARK, probe_text, surrounding_ids
from unmasked.text.templates import PLAIN, Template, read_template

logger = logging.getLogger(__name__)

SETTINGS_NAME = "llm2vec_config.json"
MODULES_NAME = "modules.json"
LENGTHS_NAME = "sentence_bert_config.json"
LENGTHS = ("query_length", "document_length")
"""The keys of length limits for `encode_query` and `encode_document` alone."""
TRUSTED = "sentence_transformers."
"""The package of all allowed module classes: loading a folder runs no other package's code."""
OLDEST = "5.2"
"""The first transformers that computes a saved folder bidirectionally."""
PROMPTS_NAME = "config_sentence_transformers.json"
STOPS_OLDER = "pruned_heads"
"""A config key that older transformers fail on, see `_complete_config`."""
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The name of the generic class, which older transformers have too."""
GENERIC_TOKENIZER = "glm"
"""A model type for which transformers uses the generic class: it loads tokenizer.json unchanged."""


@dataclass(frozen=True)
class Settings:
    """How texts become vectors, as saved in `llm2vec_config.json`.

    The first four keys are those of the original package; its folders have no ``template``.

    Attributes:
        pooling_mode: how token states become a vector.
        max_length: maximum number of tokens of an input, instruction and special tokens included.
        doc_max_length: maximum number of tokens of a text; None for no limit besides `max_length`.
        skip_instruction: whether only the tokens of the text are pooled.
        template: the strings around a text.
        compat: name of another package's rules for finding and truncating a text; None for ours.
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
    options: Mapping[str, Any],
    fixed_tokens: int,
    lengths: Mapping[str, int | None],
    behind: Sequence[nn.Module] = (),
    needs_eager: bool = False,
    closed: bool = False,
    attached: Mapping[str, torch.Tensor] = MappingProxyType({}),
    card: Card | None = None,
    with_settings: bool = True,
) -> None:
    """Write a whole model folder, or replace one.

    Args:
        path: folder to write.
        model: bare transformer, adapters merged.
        tokenizer: as made by `special_tokens.prepare_tokenizer`.
        settings: pooling and lengths.
        stock_pooling: ``pooling_mode`` and ``include_prompt`` of the stock `Pooling` module.
        options: ``prompts`` (name → prompt; with an empty prompt, too, BOS is not pooled),
            ``default_prompt_name``, ``similarity_fn_name``, optionally ``truncate_dim``.
        fixed_tokens: number of tokens of an input that are not its text (BOS, EOS).
        lengths: by name of `LENGTHS`: most tokens of an input of `encode_query`, `encode_document`.
        behind: the modules after the pooling.
        needs_eager: stock loaders must use eager attention for this family.
        closed: the causal mask is on and stays on.
        attached: the weights of adapters that were merged, to continue training (`attached`).
        card: content of the README; None keeps the README of the old folder.
        with_settings: write `llm2vec_config.json`.

    Raises:
        ModelError: a module after the pooling would not be loaded as it is.
        OutputError: the folder cannot be written.
    """
    with folder_aside(Path(path)) as folder:
        with without_bars():
            model.save_pretrained(folder)  # type: ignore[operator]
        write_attached(folder, attached)
        share_weights(folder)
        native = hasattr(model.config, NATIVE_KEY)
        _complete_config(folder / "config.json", native, needs_eager, closed)
        # Stock loaders have one limit for the whole input: take the shorter of the two.
        limit, text_limit = settings.max_length, settings.doc_max_length
        if text_limit is not None and text_limit + fixed_tokens < limit:
            limit = text_limit + fixed_tokens
        else:
            text_limit = None
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(folder)
        saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        saved["tokenizer_class"] = _TOKENIZER_CLASS
        _write_json(folder / "tokenizer_config.json", saved)
        width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        (folder / "1_Pooling").mkdir()
        _write_json(folder / "1_Pooling" / "config.json", _pooling(stock_pooling, width))
        further = [_write_module(folder, n, module) for n, module in enumerate(behind, start=2)]
        _write_json(folder / MODULES_NAME, [*_modules(), *further])
        own_limits = {name: length for name, length in lengths.items() if length is not None}
        loading = {"max_seq_length": limit, "do_lower_case": False, **own_limits}
        _write_json(folder / LENGTHS_NAME, loading | _tokenizer_args(folder))
        _write_json(folder / PROMPTS_NAME, _stock_options(options, _empty_prompt(tokenizer)))
        if with_settings:
            _write_json(folder / SETTINGS_NAME, asdict(settings))
        if card is not None:
            text = render(
                card,
                pooling_in_words(settings.pooling_mode, settings.skip_instruction),
                next(filter(None, map(_width, reversed(behind))), width),
                limit,
                str(options["similarity_fn_name"]),
                text_limit,
                own_limits,
            )
            (folder / "README.md").write_text(text, encoding="utf-8")
        leftovers = find_leftovers(Path(path), folder)
    remove_leftovers(Path(path), leftovers)  # now that the new files are in place


def read_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Every setting as given, else as saved, else the default.

    Args:
        saved: content of a `llm2vec_config.json`.
        given: by name; None stands for "not given". For `doc_max_length`, where None is a value,
            ``...`` does.

    Raises:
        ModelError: a value cannot be used, or the template is unknown.
    """
    names = [field.name for field in fields(Settings)]
    values = {name: saved[name] for name in names if name in saved}
    for name, value in given.items():
        if value is not (... if name == "doc_max_length" else None):
            values[name] = value
    for name in ("max_length", "doc_max_length"):
        if name in values and not (name == "doc_max_length" and values[name] is None):
            check_count(name, values[name], "tokens", SETTINGS_NAME)
    if not isinstance(values.get("skip_instruction", True), bool):
        found = values["skip_instruction"]
        raise ModelError(
            f"skip_instruction {found!r} is not true or false. "
            f"Fix: one of these, in {SETTINGS_NAME} or as the argument."
        )
    return Settings(**values | {"template": read_template(values.get("template"))})


def check_count(name: str, value: Any, unit: str, file: str) -> None:
    """Refuse a value that is not a whole number of 1 or more.

    Raises:
        ModelError: names the file that the value may come from.
    """
    if not is_count(value):
        raise ModelError(
            f"{name} {value!r} is not a number of {unit}. "
            f"Fix: a whole number of 1 or more, in {file} or as the argument."
        )


def within_positions(settings: Settings, positions: int | None) -> Settings:
    """The settings with `max_length` reduced to the positions of a model (None: no limit)."""
    if positions is None or settings.max_length <= positions:
        return settings
    is_default = settings.max_length == Settings.max_length
    logger.log(
        logging.INFO if is_default else logging.WARNING,
        "max_length %d: this model has %d positions, texts are cut there.",
        settings.max_length,
        positions,
    )
    return replace(settings, max_length=positions)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete_config(path: Path, has_native_key: bool, needs_eager: bool, closed: bool) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["use_cache"] = False
    if closed:
        config["is_causal"] = True  # so that our own loader keeps it closed
        return _write_json(path, config)
    if config.get("is_causal") is False and not has_native_key:
        config[NATIVE_KEY] = True  # text-embeddings-inference reads this key; others ignore it
    if needs_eager:
        config["attn_implementation"] = "eager"
    if config.get("is_causal") is False or has_native_key:
        # Older versions ignore both keys and would silently compute causally. They convert the keys
        # of this field to numbers, and so fail with this sentence; later ones do not have it.
        config[STOPS_OLDER] = {f"this encoder needs transformers {OLDEST} or later": []}
    _write_json(path, config)


def _tokenizer_args(folder: Path) -> dict[str, Any]:
    """Arguments with which stock sentence-transformers loads the tokenizer as it was saved.

    For a few families (`qwen2`) `AutoTokenizer` builds a class of its own from the vocabulary and
    drops the saved normalizer, so `MARK` would not be removed.
    """
    saved = PreTrainedTokenizerFast.from_pretrained(folder)
    probe = MARK + probe_text(saved)
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
    """The config of the stock pooling in the older schema, with one flag per mode."""
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
    """`MARK` if there is a BOS to leave out of pooling; some tokenizer classes do not remove it."""
    return MARK if surrounding_ids(tokenizer)[0] else ""


def _stock_options(options: Mapping[str, Any], empty: str) -> dict[str, Any]:
    return {
        "__version__": {
            "sentence_transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__.split("+")[0],
        },
        "model_type": "SentenceTransformer",
        **options,
        "prompts": {name: prompt or empty for name, prompt in options["prompts"].items()},
    }


def _width(module: nn.Module) -> int | None:
    """Dimension of a module's output vectors; None if the module does not change it."""
    method = getattr(module, "get_embedding_dimension", None)
    return None if method is None else int(method())


def _write_module(folder: Path, number: int, module: nn.Module) -> dict[str, Any]:
    """Write a module after the pooling, check that it is loaded unchanged, and return its row."""
    kind = type(module)
    path = f"{number}_{kind.__name__}"
    older = f"{TRUSTED}models.{kind.__name__}"  # the name in the older schema and in servers
    try:
        reference = older if import_module_class(older) is kind else ""
    except (ImportError, AttributeError):
        reference = f"{kind.__module__}.{kind.__qualname__}"
    if not reference.startswith(TRUSTED):
        raise ModelError(
            f"module {number}, a {kind.__module__}.{kind.__qualname__}, cannot be saved: loading "
            "a folder runs no code of other packages. Allowed after the pooling: modules of "
            f"sentence-transformers. Fix: del model[{number}] before saving, and add it again."
        )
    (folder / path).mkdir()
    module.save(str(folder / path), safe_serialization=True)  # type: ignore[operator]
    share_weights(folder / path)
    loaded = kind.load(str(folder / path))  # type: ignore[attr-defined]
    before, after = module.state_dict(), loaded.state_dict()
    same_weights = before.keys() == after.keys() and all(
        torch.equal(before[name].cpu(), after[name]) for name in before
    )
    parts, loaded_parts = (list(map(repr, each.modules())) for each in (module, loaded))
    if parts != loaded_parts or not same_weights:
        raise ModelError(
            f"module {number} would be loaded differently: {parts} as {loaded_parts}. "
            "Fix: an activation function of torch.nn with its default arguments."
        )
    return {"idx": number, "name": str(number), "path": path, "type": reference}
