"""The saved folder: plain files that stock loaders read, without this package or remote code.

It is written for transformers (`AutoModel`, still bidirectional), sentence-transformers, and
servers that parse the older sentence-transformers schema. The compact schema that version 6 writes
makes some servers silently pool the wrong token, so the files here follow the older one.

    config.json, model.safetensors       the transformer, `is_causal: false`
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling/config.json, sentence_bert_config.json, 2_Normalize/, 2_Dense/ ...
    config_sentence_transformers.json    prompts; an empty one is `special_tokens.MARK`, see there
    attached/                            adapters that were attached, to train on with them
    llm2vec_config.json                  what only this package and the original read
    README.md                            model card

A folder is written aside and moved into place, so an interrupted save leaves the old one whole.
What another model left in it, and a loader would read, is removed first.
Cost: the weights are written once; the tokenizer is loaded twice to see what `AutoTokenizer` makes
of it.
"""

from __future__ import annotations

import json
import logging
import shutil
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
from unmasked.checkpoint.card import Card, render
from unmasked.checkpoint.leftovers import remove_leftovers
from unmasked.checkpoint.weights import without_bars
from unmasked.errors import ModelError
from unmasked.files.writing import folder_aside
from unmasked.mask.opening import NATIVE_KEY
from unmasked.text.special_tokens import MARK, probe_text, surrounding_ids
from unmasked.text.templates import PLAIN, Template, read_template

logger = logging.getLogger(__name__)

SETTINGS_NAME = "llm2vec_config.json"
MODULES_NAME = "modules.json"
LENGTHS_NAME = "sentence_bert_config.json"
LENGTHS = ("query_length", "document_length")
"""Limits for the inputs of `encode_query` and `encode_document` alone, where there are any."""
TRUSTED = "sentence_transformers."
"""Where the classes of modules may come from: no other package's code is run to load a folder."""
OLDEST = "5.2"
"""The first transformers that computes a saved folder bidirectionally."""
PROMPTS_NAME = "config_sentence_transformers.json"
_STOPS_OLDER = "pruned_heads"
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The name of the generic class that older transformers know as well."""
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
        options: ``prompts`` (name → prompt; an empty prompt leaves BOS out of pooling all the
            same), ``default_prompt_name``, ``similarity_fn_name``, perhaps ``truncate_dim``.
        fixed_tokens: number of tokens of an input that are not its text (BOS, EOS).
        lengths: by name of `LENGTHS`: tokens of an input of `encode_query`, `encode_document`.
        behind: the modules behind the pooling.
        needs_eager: stock loaders must use eager attention for this family.
        closed: the mask is closed, and is to stay so.
        attached: the weights of adapters that were merged, to train on with them (`attached`).
        card: what the README says; None leaves the README that is there.
        with_settings: write `llm2vec_config.json`.

    Raises:
        ModelError: a module behind the pooling that would not come back as it is.
        OutputError: the folder cannot be written.
    """
    with folder_aside(Path(path)) as folder:
        with without_bars():
            model.save_pretrained(folder)  # type: ignore[operator]
        write_attached(folder, attached)
        _share(folder)
        native = hasattr(model.config, NATIVE_KEY)
        _complete_config(folder / "config.json", native, needs_eager, closed)
        limit, text_limit = settings.max_length, settings.doc_max_length
        if text_limit is not None and text_limit + fixed_tokens < limit:
            limit = text_limit + fixed_tokens
        else:
            text_limit = None
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(folder)
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        _write_json(
            folder / "tokenizer_config.json", {**named, "tokenizer_class": _TOKENIZER_CLASS}
        )
        width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        (folder / "1_Pooling").mkdir()
        _write_json(folder / "1_Pooling" / "config.json", _pooling(stock_pooling, width))
        further = [_write_module(folder, n, module) for n, module in enumerate(behind, start=2)]
        _write_json(folder / MODULES_NAME, [*_modules(), *further])
        asked = {name: length for name, length in lengths.items() if length is not None}
        loading = {"max_seq_length": limit, "do_lower_case": False, **asked}
        _write_json(folder / LENGTHS_NAME, loading | _tokenizer_args(folder))
        _write_json(folder / PROMPTS_NAME, _stock_options(options, _empty_prompt(tokenizer)))
        if with_settings:
            _write_json(folder / SETTINGS_NAME, asdict(settings))
        if card is not None:
            text = render(
                card,
                settings.pooling_mode,
                next(filter(None, map(_width, reversed(behind))), width),
                limit,
                str(options["similarity_fn_name"]),
                text_limit,
                asked,
            )
            (folder / "README.md").write_text(text, encoding="utf-8")
        remove_leftovers(Path(path), folder)


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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete_config(path: Path, has_native_key: bool, needs_eager: bool, closed: bool) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["use_cache"] = False
    if closed:
        config["is_causal"] = True  # it stays closed where it is loaded here
        return _write_json(path, config)
    if config.get("is_causal") is False and not has_native_key:
        config[NATIVE_KEY] = True  # what text-embeddings-inference reads; others ignore it
    if needs_eager:
        config["attn_implementation"] = "eager"
    if config.get("is_causal") is False or has_native_key:
        # Older versions read neither key and would compute causally without a word. They turn the
        # keys of this field into numbers, and so fail with this sentence; later ones have no such
        # field.
        config[_STOPS_OLDER] = {f"this encoder needs transformers {OLDEST} or later": []}
    _write_json(path, config)


def _tokenizer_args(folder: Path) -> dict[str, Any]:
    """What stock sentence-transformers must be told to load the tokenizer as it was saved.

    For a few families (`qwen2`) `AutoTokenizer` builds a class of its own from the vocabulary and
    drops the saved normalizer, so that it would keep `MARK`.
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
    """Numbers of a vector behind a module; None if it leaves that as it is."""
    found = getattr(module, "get_embedding_dimension", None)
    return None if found is None else int(found())


def _write_module(folder: Path, number: int, module: nn.Module) -> dict[str, Any]:
    """Write a module behind the pooling, see that it comes back, and return its row."""
    kind = type(module)
    path = f"{number}_{kind.__name__}"
    known = f"{TRUSTED}models.{kind.__name__}"  # as the older schema, and other servers, name it
    try:
        reference = known if import_module_class(known) is kind else ""
    except (ImportError, AttributeError):
        reference = f"{kind.__module__}.{kind.__qualname__}"
    if not reference.startswith(TRUSTED):
        raise ModelError(
            f"module {number}, a {kind.__module__}.{kind.__qualname__}, cannot be saved: a folder "
            "is loaded without code of others. Allowed behind the pooling: modules of "
            f"sentence-transformers. Fix: del model[{number}] before saving, and put it back on."
        )
    (folder / path).mkdir()
    module.save(str(folder / path), safe_serialization=True)  # type: ignore[operator]
    _share(folder / path)
    again = kind.load(str(folder / path))  # type: ignore[attr-defined]
    before, after = module.state_dict(), again.state_dict()
    same = before.keys() == after.keys() and all(
        torch.equal(before[name].cpu(), after[name]) for name in before
    )
    parts, found = (list(map(repr, each.modules())) for each in (module, again))
    if parts != found or not same:
        raise ModelError(
            f"module {number} would not come back as it is: {parts} is read as {found}. "
            "Fix: an activation function of torch.nn with its default arguments."
        )
    return {"idx": number, "name": str(number), "path": path, "type": reference}


def _share(folder: Path) -> None:
    """Let all read the weights who may read the folder's other files: safetensors hides them."""
    for weights in folder.glob("*.safetensors"):
        plain = next(file for file in folder.iterdir() if file.suffix == ".json")
        shutil.copymode(plain, weights)
