"""What an encoder says at this moment, as a folder, and back: settings, prompts, further modules.

A user may have changed anything since the encoder was loaded: lengths, prompts, the similarity, an
adapter, a `Normalize` or `Dense` behind the pooling. All of it is saved, or saving refuses, so that
the folder gives the vectors that the object gives. Nothing of this computes a vector.

Cost: a copy of the model in memory where an adapter is attached; a module behind the pooling is
read once more to see that it comes back as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sentence_transformers.util import import_module_class
from torch import nn

from unmasked.checkpoint import adapters, folder
from unmasked.checkpoint.card import Card
from unmasked.checkpoint.location import Location
from unmasked.checkpoint.weights import require_finite
from unmasked.errors import ModelError, first_line
from unmasked.mask.proof import stock_loading
from unmasked.text.special_tokens import MARK
from unmasked.text.templates import Template

logger = logging.getLogger(__name__)

_PICKLED = "pytorch_model.bin"
_BLANK = ("default", "blank", "no_prompt")
"""Names for the prompt of texts without one; the first that the user has not taken."""


def save_encoder(
    encoder: Any,
    path: str | Path | None,
    card: Card,
    with_card: bool = True,
    with_settings: bool = True,
    safe: bool = True,
) -> None:
    """Write the folder of an encoder as it is now; see `folder.write_folder`.

    Args:
        encoder: a `TextEncoder`.
        path: folder to write; None writes nothing.
        card: what the README says.
        with_card: False writes no README.
        with_settings: False leaves `llm2vec_config.json` out.
        safe: only True: weights are always safetensors.

    Raises:
        ModelError: something of it cannot be in a folder, or pickles are asked for.
        OutputError: the folder cannot be written.
    """
    if path is None:
        return
    if not safe:
        raise ModelError(
            "weights are written as safetensors only: a pickle can run code. "
            "Fix: leave safe_serialization out."
        )
    tokens, settings = encoder.backbone.tokens, encoder.settings
    tokenizer, exact = tokens.for_stock()
    if tokenizer.truncation_side != "right":
        logger.warning("truncation_side has no effect: texts are cut at their end, and so saved.")
        tokenizer.truncation_side = "right"
    model = merged(encoder.backbone.auto_model)
    stock = stock_loading(model)
    _tell_differences(settings, tokens.template, exact, stock)
    folder.write_folder(
        path,
        model,
        tokenizer,
        settings,
        encoder[1].get_config_dict(),
        _options(encoder, tokens.template.prefix),
        fixed_tokens=tokens.fixed_tokens,
        lengths={name: getattr(encoder.backbone, name) for name in folder.LENGTHS},
        behind=list(encoder)[2:],
        needs_eager=stock == "eager",
        closed=encoder.report.verdict == "impossible",
        attached=adapters.attached_weights(encoder.backbone.auto_model, model),
        card=card if with_card else None,
        with_settings=with_settings,
    )


def settings_now(tokens: Any, pooling: Any, rules: str | None) -> folder.Settings:
    """The settings that a `TextTokenizer` and a `TextPooling` have at this moment."""
    pools_all = pooling.include_prompt and pooling.mode != "bos_token"
    return folder.Settings(
        pooling.mode,
        tokens.max_length,
        tokens.doc_max_length,
        tokens.skip_instruction and not pools_all,
        tokens.template,
        rules,
    )


def deciding(encoder: Any) -> list[Any]:
    """What decides an encoder's vectors beside weights and tokenizer, as JSON can hold it.

    A decoder has the same weights with its mask closed as with it open, and a `Normalize` has none.
    What is as it mostly is stays out, so that folders of earlier versions can be continued.
    """
    settings, proof, backbone = encoder.settings, encoder.report, encoder.backbone
    seen = (proof.verdict, proof.causal_layers, proof.window)
    rare = {
        "truncate_dim": encoder.truncate_dim,
        "lengths": [getattr(backbone, name) for name in folder.LENGTHS],
        "behind": [str(module) for module in list(encoder)[2:]],
        "mask": [] if seen == ("full", (), None) else seen,
    }
    there = {name: value for name, value in rare.items() if value not in (None, [], [None, None])}
    return [asdict(settings), settings.compat is not None, *filter(None, [there])]


def named_card(card: Card, encoder: Any, name: str | None) -> Card:
    """A card with the name of the model: as given, unless that is a path, or as its data says."""
    if not name or Path(name).exists():
        name = encoder.model_card_data.model_id
    return replace(card, name=name)


def _tell_differences(
    settings: folder.Settings, template: Template, exact: bool, stock: str
) -> None:
    """Log what a stock loader will make of the folder that differs from the encoder."""
    if not exact:
        logger.warning(
            "Stock loaders cannot pool this template exactly (%r ... %r): load the folder with "
            "unmasked, or train and save without a template.",
            template.prefix,
            template.suffix,
        )
    if stock == "causal":
        logger.warning("Only unmasked opens the mask of this family; stock loaders do not.")
    if settings.doc_max_length is not None and settings.doc_max_length < settings.max_length:
        logger.info(
            "doc_max_length %d: stock loaders know one limit for prompt and text together, so that "
            "they cut a long text behind a prompt shorter, by the tokens of the prompt.",
            settings.doc_max_length,
        )


def _options(encoder: Any, prefix: str) -> dict[str, Any]:
    """What `SentenceTransformer` saves of an encoder, for a loader that puts the prompts first.

    A text without a prompt needs one in the folder: the stock loader leaves BOS out of pooling only
    behind a prompt.
    """
    default, now = encoder.default_prompt_name, encoder.prompts
    roles = {"query": ("query",), "document": ("document", "passage", "corpus")}
    # Loaders give each role a prompt of its own; it has the one that acts for it now.
    acting = {r: next((n for n in names if n in now), default) for r, names in roles.items()}
    prompts = {role: now.get(name, "") for role, name in acting.items()} | now
    if default is None:
        default = next(name for name in _BLANK if not prompts.get(name))
    prompts = {default: "", **prompts}
    options = {
        "prompts": {name: prefix + (prompt or "") for name, prompt in prompts.items()},
        "default_prompt_name": default,
        "similarity_fn_name": encoder.similarity_fn_name,
    }
    cut = encoder.truncate_dim
    return options if cut is None else {**options, "truncate_dim": cut}


def read_options(saved: Mapping[str, Any], template: Template) -> dict[str, Any]:
    """Arguments of `SentenceTransformer` that a `config_sentence_transformers.json` asks for.

    Args:
        saved: content of the file; empty if there is none.
        template: what stands around a text; it is part of every saved prompt.

    Returns:
        ``prompts`` without the template and the mark of an empty one, and, where the file has them,
        ``default_prompt_name``, ``similarity_fn_name`` and ``truncate_dim``.
    """
    prompts = {
        name: (prompt or "").removeprefix(MARK).removeprefix(template.prefix)
        for name, prompt in (saved.get("prompts") or {}).items()
    }
    default = saved.get("default_prompt_name")
    if default in _BLANK and not prompts.get(default):
        prompts.pop(default, None)  # made by `save`, for texts without a prompt
    names = ("similarity_fn_name", "truncate_dim")
    options = {name: saved[name] for name in names if saved.get(name) is not None}
    if default in prompts:
        options["default_prompt_name"] = default
    return {"prompts": prompts, **options}


def merged(model: nn.Module) -> nn.Module:
    """The bare transformer; where adapters are attached, a copy with the active ones merged.

    Adapters that are switched off (`disable_adapter()`, `disable_adapters()`) do not act on the
    vectors, so they are left out.
    """
    if not adapters.has_adapters(model):
        return model
    return adapters.merge_attached(copy.deepcopy(model))


def load_behind(location: Location, allow_pickle: bool = False) -> list[nn.Module]:
    """The modules behind the pooling of a saved encoder, such as `Normalize` and `Dense`.

    Args:
        location: folder or hub repository; without a `modules.json` there are none.
        allow_pickle: read weights that are there as a pickle only.

    Raises:
        ModelError: a class that is not of sentence-transformers, pickled, broken or missing files.
    """
    rows = location.read_list(folder.MODULES_NAME)
    types = [str(row.get("type", "")).rpartition(".")[2] for row in rows]
    pooled = types.index("Pooling") + 1 if "Pooling" in types else 2
    if strange := [name for name in types[1:pooled] if name != "Pooling"]:
        logger.warning("%s: %s between transformer and pooling left out.", location.name, strange)
    return [_load_one(location, row, allow_pickle) for row in rows[pooled:]]


def _load_one(location: Location, row: Mapping[str, Any], allow_pickle: bool) -> nn.Module:
    kind, path = str(row.get("type", "")), str(row.get("path", ""))
    if not kind.startswith(folder.TRUSTED) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ModelError(
            f"{location.name} has a module {kind or row} in '{path}' behind its pooling. Allowed: "
            "classes of sentence-transformers, in a folder inside; code of others is never run. "
            "Fix: a copy without it in modules.json, if its vectors are not needed as they were."
        )
    weights = [location.fetch(f"{path}/{name}") for name in ("model.safetensors", _PICKLED)]
    if weights[1] and not weights[0] and not allow_pickle:
        raise ModelError(
            f"{location.name}/{path} has pickled weights only, and a pickle can run code. "
            "Fix: convert them to safetensors, or, if you trust them, allow_pickle=True."
        )
    hub = dict(location.hub)
    if "cache_dir" in hub:
        hub["cache_folder"] = hub.pop("cache_dir")
    try:
        kept: Any = import_module_class(kind)
        module: nn.Module = kept.load(location.name, subfolder=path, **hub)
    except Exception as error:  # each class has errors of its own
        raise ModelError(
            f"{location.name}/{path}: the module {kind} cannot be read: {first_line(error)} "
            "Fix: download or save the model again, whole."
        ) from error
    require_finite(module.state_dict(), f"{location.name}/{path}")
    return module
