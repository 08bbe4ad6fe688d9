"""Saves the current state of an encoder to a folder, and reads settings, prompts and modules back.

A user may have changed anything since the encoder was loaded: lengths, prompts, the similarity, an
adapter, a `Normalize` or `Dense` after the pooling. Everything is saved, or saving is refused, so
that the folder gives the same vectors as the object. Nothing here computes a vector.

Cost: a copy of the model in memory if an adapter is attached; a module after the pooling is loaded
once more to check that it is the same.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import import_module_class
from torch import nn

from unmasked.checkpoint import adapters, folder
from unmasked.checkpoint.card import TRAINED_ON, Card, front_matter
from unmasked.checkpoint.location import Location, expanded
from unmasked.checkpoint.weights import require_finite
from unmasked.errors import ModelError, OutputError, UnmaskedError, first_line, unknown
from unmasked.mask.proof import stock_loading
from unmasked.text.special_tokens import MARK
from unmasked.text.templates import Template

logger = logging.getLogger(__name__)

_PICKLED = "pytorch_model.bin"
_BLANK = ("default", "blank", "no_prompt")
"""Names for the empty default prompt; the first one that the user has no prompt of is used."""


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
        path: folder to write, where ``~/`` is the home folder; None writes nothing.
        card: content of the README.
        with_card: False writes no README.
        with_settings: False leaves `llm2vec_config.json` out.
        safe: only True: weights are always safetensors.

    Raises:
        ModelError: a part of the encoder cannot be saved, or `safe` is False.
        OutputError: the folder cannot be written.
    """
    if path is None:
        return
    if not str(path):
        raise OutputError("the folder to save in is '', an empty name. Fix: name a folder.")
    if not safe:
        raise ModelError(
            "weights are written as safetensors only: a pickle can run code. "
            "Fix: leave safe_serialization out."
        )
    tokens, settings = encoder.backbone.tokens, encoder.settings
    tokenizer, exact = tokens.for_stock()
    if tokenizer.truncation_side != "right":
        logger.warning("truncation_side has no effect: texts are always cut at their end.")
        tokenizer.truncation_side = "right"
    model = merged(encoder.backbone.auto_model)
    stock = stock_loading(model)
    _log_differences(settings, tokens.template, exact, stock)
    folder.write_folder(
        expanded(path),
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
    """The current settings of a `TextTokenizer` and a `TextPooling`."""
    pools_all = pooling.include_prompt and pooling.mode != "bos_token"
    return folder.Settings(
        pooling.mode,
        tokens.max_length,
        tokens.doc_max_length,
        tokens.skip_instruction and not pools_all,
        tokens.template,
        rules,
    )


_IGNORED_KEYS = re.compile(
    "_.*|architectures|transformers_version|(torch_)?dtype|auto_map|is_causal|use_cache|.*_token_id|"
    "use_bidirectional_attention|sliding_window|pruned_heads|quantization_config|return_dict|"
    "output_.*|.*_range|.*dropout|.*_pdrop|id2label|label2id|problem_type|tie_word_embeddings"
)
"""Keys of a config that do not change vectors, or that only open the mask, which is proved."""


def deciding(encoder: Any) -> list[Any]:
    """Everything besides weights and tokenizer that determines the vectors, as JSON values.

    The weights do not tell whether the mask is open, and a `Normalize` has no weights. With another
    number of heads, epsilon or scaling of positions in the config, the same weights give other
    vectors. Usual values are left out, and so are those of the config that are its family's
    defaults: a release of transformers that adds a key does not make another model of this one.
    """
    settings, proof, backbone = encoder.settings, encoder.report, encoder.backbone
    mask = (proof.verdict, proof.causal_layers, proof.window)
    rare = {
        "truncate_dim": encoder.truncate_dim,
        "lengths": [getattr(backbone, name) for name in folder.LENGTHS],
        "behind": [str(module) for module in list(encoder)[2:]],
        "mask": [] if mask == ("full", (), None) else mask,
    }
    unusual = {name: value for name, value in rare.items() if value not in (None, [], [None, None])}
    config = _own_keys(backbone.model.config)
    return [asdict(settings), settings.compat is not None, *filter(None, [unusual]), config]


def _own_keys(config: Any) -> dict[str, Any]:
    """The keys of a config that change vectors, without the defaults of its family."""
    defaults: dict[str, Any] = {}
    with suppress(TypeError, ValueError):  # a family whose config has no defaults
        defaults = type(config)().to_dict()
    return {
        name: value
        for name, value in config.to_dict().items()
        if not _IGNORED_KEYS.fullmatch(name)
        and (name == "model_type" or name not in defaults or defaults[name] != value)
    }


def own_card(encoder: Any, model_name: str | None, datasets: Sequence[str]) -> Card:
    """The card of an encoder: with the base and the data of the folder that it was loaded from.

    Args:
        encoder: a `TextEncoder`; a `base_name` that was set after loading takes precedence.
        model_name: the name of the model, if it has one.
        datasets: what it was trained on since.
    """
    name, place = encoder.loaded
    base, trained = made_from(place) if place else (None, [])
    if encoder.base_name != name or not base:
        base = encoder.base_name
    names = list(dict.fromkeys([*trained, *datasets]))
    return named_card(Card(base, encoder.report.summary(), datasets=names), encoder, model_name)


def made_from(place: Location) -> tuple[str | None, list[str]]:
    """The base and the training data in the card of a folder that this package saved."""
    with suppress(UnmaskedError):  # the folder or the hub may be out of reach by now
        if place.read_json(folder.SETTINGS_NAME) and (file := place.fetch("README.md")):
            known = front_matter(file)
            data, base = known.get(TRAINED_ON), known.get("base_model")
            if not isinstance(base, str):  # a folder of another machine stands in the text alone
                text = Path(file).read_text(encoding="utf-8", errors="replace")
                base = found[1] if (found := _BASE.search(text)) else None
            return base, [str(name) for name in data] if isinstance(data, list) else []
    return None, []


_BASE = re.compile(r"^- \*\*Base model:\*\* (.+)$", re.MULTILINE)


def named_card(card: Card, encoder: Any, name: str | None) -> Card:
    """A card with the model's name: `name`, or the one in `model_card_data` if that is a path."""
    if not name or Path(name).exists():
        name = encoder.model_card_data.model_id
    return replace(card, name=name)


def _log_differences(
    settings: folder.Settings, template: Template, exact: bool, stock: str
) -> None:
    """Log how vectors from a stock loader will differ from those of the encoder."""
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
            "doc_max_length %d: stock loaders have one limit for prompt and text together, so they "
            "cut a long text after a prompt shorter, by the length of the prompt.",
            settings.doc_max_length,
        )


def _options(encoder: Any, prefix: str) -> dict[str, Any]:
    """The options that `SentenceTransformer` saves: prompts, similarity and truncation.

    Every text gets a prompt, if only an empty one: the stock loader leaves BOS out of pooling only
    after a prompt.
    """
    default, own = encoder.default_prompt_name, encoder.prompts
    # Stock loaders add an empty prompt for each role, which would replace the prompt that the role
    # uses now. So that one is saved under the name of the role.
    roles = {"query": ("query",), "document": ("document", "passage", "corpus")}
    used = {role: next((n for n in names if n in own), default) for role, names in roles.items()}
    prompts = {role: own.get(name, "") for role, name in used.items()} | own
    if default is None:
        default = next(name for name in _BLANK if not prompts.get(name))
    prompts = {default: "", **prompts}
    options = {
        "prompts": {name: prefix + (prompt or "") for name, prompt in prompts.items()},
        "default_prompt_name": default,
        "similarity_fn_name": encoder.similarity_fn_name,
    }
    width = encoder.truncate_dim
    return options if width is None else {**options, "truncate_dim": width}


def read_options(saved: Mapping[str, Any], template: Template) -> dict[str, Any]:
    """Arguments of `SentenceTransformer` from a `config_sentence_transformers.json`.

    Args:
        saved: content of the file; empty if there is none.
        template: the strings around a text; its prefix is part of every saved prompt.

    Returns:
        ``prompts`` without template and `MARK`, and, if the file has them,
        ``default_prompt_name``, ``similarity_fn_name`` and ``truncate_dim``.

    Raises:
        ModelError: a value of another kind, as after an edit by hand.
    """
    _check_options(saved)
    prompts = {
        name: (prompt or "").removeprefix(MARK).removeprefix(template.prefix)
        for name, prompt in (saved.get("prompts") or {}).items()
    }
    default = saved.get("default_prompt_name")
    if default in _BLANK and not prompts.get(default):
        prompts.pop(default, None)  # `save` has added it for texts without a prompt
    names = ("similarity_fn_name", "truncate_dim")
    options = {name: saved[name] for name in names if saved.get(name) is not None}
    if default in prompts:
        options["default_prompt_name"] = default
    return {"prompts": prompts, **options}


def _check_options(saved: Mapping[str, Any]) -> None:
    file = folder.PROMPTS_NAME
    prompts = saved.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(prompt, str | None) for prompt in prompts.values()
    ):
        example = '{"query": "Find the answer:\\n"}'
        raise ModelError(f"{file}: prompts are not texts by name. Fix: such as {example}.")
    allowed = SentenceTransformer.SUPPORTED_SIMILARITY_FN_NAMES
    if (name := saved.get("similarity_fn_name")) is not None and name not in allowed:
        raise ModelError(unknown(f"similarity_fn_name in {file}", str(name), allowed))
    if not isinstance(name := saved.get("default_prompt_name"), str | None):
        raise ModelError(
            f"{file}: default_prompt_name {name!r} is not the name of a prompt. "
            f"Fix: one of {', '.join(prompts) or 'no prompts'}, or null."
        )
    if (width := saved.get("truncate_dim")) is not None:
        folder.check_count("truncate_dim", width, "dimensions", file)


def merged(model: nn.Module) -> nn.Module:
    """The bare transformer; if adapters are attached, a copy with the active ones merged.

    Disabled adapters (`disable_adapter()`, `disable_adapters()`) have no effect on the vectors, so
    they are left out.
    """
    if not adapters.has_adapters(model):
        return model
    return adapters.merge_attached(copy.deepcopy(model))


def load_behind(location: Location, allow_pickle: bool = False) -> list[nn.Module]:
    """The modules after the pooling of a saved encoder, such as `Normalize` and `Dense`.

    Args:
        location: folder or hub repository; without a `modules.json` there are none.
        allow_pickle: read weights that exist only as a pickle.

    Raises:
        ModelError: a class that is not from sentence-transformers; pickled, broken or missing
            files.
    """
    rows = location.read_list(folder.MODULES_NAME)
    types = [str(row.get("type", "")).rpartition(".")[2] for row in rows]
    first = types.index("Pooling") + 1 if "Pooling" in types else 2
    if others := [name for name in types[1:first] if name != "Pooling"]:
        logger.warning("%s: %s between transformer and pooling left out.", location.name, others)
    return [_load_module(location, row, allow_pickle) for row in rows[first:]]


def _load_module(location: Location, row: Mapping[str, Any], allow_pickle: bool) -> nn.Module:
    kind, path = str(row.get("type", "")), str(row.get("path", ""))
    if not kind.startswith(folder.TRUSTED) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ModelError(
            f"{location.name} has a module {kind or row} in '{path}' after its pooling. Allowed: "
            "classes of sentence-transformers, in a folder inside; code of other packages is never "
            "run. Fix: remove it from modules.json in a copy; the vectors will be different ones."
        )
    weights = [location.fetch(f"{path}/{name}") for name in ("model.safetensors", _PICKLED)]
    if weights[1] and not weights[0] and not allow_pickle:
        raise ModelError(
            f"{location.name}/{path} has pickled weights only, and a pickle can run code. "
            "Fix: convert them to safetensors, or, if you trust them, allow_pickle=True."
        )
    hub = dict(location.hub)
    if "cache_dir" in hub:  # sentence-transformers has another name for it
        hub["cache_folder"] = hub.pop("cache_dir")
    try:
        module_class: Any = import_module_class(kind)
        module: nn.Module = module_class.load(location.name, subfolder=path, **hub)
    except Exception as error:  # each class has errors of its own
        raise ModelError(
            f"{location.name}/{path}: the module {kind} cannot be read: {first_line(error)} "
            "Fix: download or save the model again, whole."
        ) from error
    require_finite(module.state_dict(), f"{location.name}/{path}")
    return module
