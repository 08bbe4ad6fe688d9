"""From a name to a transformer and its tokenizer: the hub, local folders, adapters, `nano`.

Nothing from a repository is executed: no remote code, and no pickles unless asked for. Whatever
goes wrong is told as a `ModelError` with the fix.

A checkpoint of the original package is an adapter that names its base, with a config beside it that
points to code; the config and the code are never used. It is read with the preprocessing it was
made with (`templates`), because its `llm2vec_config.json` does not say.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unmasked.checkpoint import adapters
from unmasked.checkpoint.adapters import Source
from unmasked.checkpoint.folder import PROMPTS_NAME, SETTINGS_NAME
from unmasked.checkpoint.weights import BUNDLED, first_line, load_model, require_whole, why
from unmasked.errors import ModelError, NotBidirectionalError
from unmasked.forward import precision
from unmasked.forward.precision import Precision
from unmasked.mask.proof import Proof, open_config, open_mask, require
from unmasked.text.templates import PUBLISHED, detect
from unmasked.text.tokens import without_blank_mask

logger = logging.getLogger(__name__)


def bundled_path() -> Path:
    """Folder of the bundled decoder."""
    return Path(str(files("unmasked"))) / BUNDLED


def resolve_base(base: str | Path) -> str:
    """A folder or hub name; `nano` is the bundled decoder (a folder is ``./nano``)."""
    return str(bundled_path()) if str(base) == BUNDLED else str(base).rstrip("/") or "/"


@dataclass(frozen=True)
class Loaded:
    """A transformer, its tokenizer, and what its folder says.

    Attributes:
        report: the proof; None if the model was left causal on purpose.
        precision: of the weights, and why.
        settings: how texts become vectors, as far as the folder says.
        prompts: name → text put before inputs, as saved.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: Proof | None
    precision: Precision
    settings: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)


def load(
    name: str | Path,
    peft: str | Path | list[str | Path] | None = None,
    enable_bidirectional: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str | None = None,
    allow_partial: bool = False,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    compat: str | None = None,
    **hub: Any,
) -> Loaded:
    """Load a bare transformer, open its mask, prove it, and merge adapters into it.

    Args:
        name: `nano`, a folder or a hub name; one with an adapter stands for its base plus it.
        peft: adapter or adapters to merge, in this order; ``owner/name@revision`` is a revision.
        enable_bidirectional: False leaves the model as it was trained.
        dtype: of the weights; see `precision.pick`.
        device: where it will run; only `dtype` looks at it.
        attention: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None lets transformers choose,
            and eager is tried where that choice stays causal.
        allow_partial: accept a model with causal mixing layers beside attention.
        base: where the base of an adapter is, if not where the adapter says.
        allow_pickle: read weights that are there as pickles only (tensors only, no code).
        compat: keep the tokenizer exactly as a checkpoint of the original package has it.
        hub: ``revision`` (of `name`), ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ModelError: not found, no tokenizer, pickled weights, an adapter that does not fit.
        NotBidirectionalError: the proof failed.
    """
    given = Source(resolve_base(name), hub)
    added = [_peft_source(item, hub) for item in _listed(peft)]
    trunk, chain = _resolve_chain(given, base)
    config = _load_config(trunk, given if chain else None)
    chosen = precision.pick(dtype, torch.device(device), config)
    original = is_original(given) or any(is_original(source) for source in added)
    tokenizer = _load_tokenizer(given if chain and _has_tokenizer(given) else trunk)
    weights = {"use_safetensors": None if allow_pickle else True}
    attempts = [attention] if attention else [None, "eager"]
    for number, implementation in enumerate(attempts, start=1):
        live = open_config(config) if enable_bidirectional else config
        model, missing = load_model(trunk, live, chosen.dtype, implementation, **weights)
        require_whole(trunk.name, missing)
        report = open_mask(model) if enable_bidirectional else None
        try:
            if report is not None:
                require(report, allow_partial=allow_partial)
            break
        except NotBidirectionalError:
            if number == len(attempts) or report is None or report.attention == "eager":
                raise
    adapters.merge(model, [*chain, *added], allow_pickle)
    settings = _settings([*reversed(added), given])
    if original:
        if compat is None:
            tokenizer = without_blank_mask(tokenizer)
        settings = {"doc_max_length": 400} | settings
        if settings.get("template") is None:
            found = detect(tokenizer.chat_template, tokenizer.get_vocab())
            settings["template"] = found or PUBLISHED
            logger.info("original checkpoint %s: %s", given.name, settings["template"])
    saved = _read_json(given, PROMPTS_NAME).get("prompts") or {}
    return Loaded(model.eval(), tokenizer, report, chosen, settings, saved)


def is_original(source: Source) -> bool:
    """Whether a folder or repository comes from the original package (or the seed system).

    Its encoders have an `llm2vec_config.json` that says nothing of a template; its MNTP stage
    leaves an adapter with a tokenizer beside it.
    """
    settings = _read_json(source, SETTINGS_NAME)
    if settings:
        return "template" not in settings
    return adapters.is_adapter(source.name, **source.hub) and _has_tokenizer(source)


def _listed(peft: str | Path | list[str | Path] | None) -> list[str | Path]:
    if peft is None:
        return []
    return peft if isinstance(peft, list) else [peft]


def _peft_source(given: str | Path, hub: dict[str, Any]) -> Source:
    rest = {key: value for key, value in hub.items() if key != "revision"}
    name, _, revision = str(given).partition("@")
    if revision and not Path(given).exists():
        return Source(name, {**rest, "revision": revision})
    return Source(resolve_base(given), rest)


def _resolve_chain(given: Source, base: str | Path | None) -> tuple[Source, list[Source]]:
    """The decoder behind a name, and the adapters on the way to it, first trained first."""
    trunk, chain = given, list[Source]()
    while adapters.is_adapter(trunk.name, **trunk.hub):
        chain.insert(0, trunk)
        config = adapters.read_config(trunk.name, **trunk.hub)
        stated = base or config.base_model_name_or_path
        if not stated:
            raise ModelError(
                f"{trunk.name} is an adapter that does not name its base. "
                "Fix: give the base first and the adapter as `peft`."
            )
        rest = {key: value for key, value in given.hub.items() if key != "revision"}
        revision = None if base else config.revision
        trunk = Source(resolve_base(stated), rest | ({"revision": revision} if revision else {}))
        if any(trunk.name == passed.name for passed in chain):
            raise ModelError(
                f"{chain[-1].name} names itself as its base. "
                "Fix: base=MODEL, the decoder it was trained on."
            )
    return trunk, chain


def _settings(sources: list[Source]) -> dict[str, Any]:
    """What the first of the sources that has an `llm2vec_config.json` says."""
    return next((found for s in sources if (found := _read_json(s, SETTINGS_NAME))), {})


def _read_json(source: Source, filename: str) -> dict[str, Any]:
    path = adapters.fetch(source.name, filename, **source.hub)
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{source.name}/{filename} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{source.name}/{filename} is no JSON object.")
    return content


def _has_tokenizer(source: Source) -> bool:
    names = "tokenizer.json", "tokenizer.model", "vocab.json"
    return any(adapters.fetch(source.name, name, **source.hub) for name in names)


def read_config(name: str | Path, **hub: Any) -> PretrainedConfig:
    """The config of a decoder."""
    return _load_config(Source(resolve_base(name), hub))


def read_tokenizer(name: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a decoder, as it is."""
    return _load_tokenizer(Source(resolve_base(name), hub))


def load_causal_lm(
    base: str | Path, dtype: torch.dtype, attention: str | None = None, **hub: Any
) -> PreTrainedModel:
    """The base with its language-model head, mask open (for MNTP). The trunk must be proved.

    Raises:
        ModelError: the folder has no head, as one that was saved as an encoder.
    """
    from transformers import AutoModelForCausalLM

    source = Source(resolve_base(base), hub)
    config = open_config(_load_config(source))
    model, missing = load_model(source, config, dtype, attention, AutoModelForCausalLM)
    if missing:
        raise ModelError(
            f"{source.name} has no language-model head ({', '.join(missing[:3])} missing), and "
            "MNTP predicts tokens. Fix: start MNTP from the decoder itself."
        )
    return model  # type: ignore[no-any-return]


def load_config(base: str | Path, **hub: Any) -> PretrainedConfig:
    """The config alone, mask open: nothing else is fetched.

    Raises:
        ModelError: there is none here or on the hub.
    """
    return open_config(_load_config(Source(resolve_base(base), hub)))


def load_tokenizer(base: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: there is none here or on the hub.
    """
    return _load_tokenizer(Source(resolve_base(base), hub))


def _load_config(source: Source, adapter: Source | None = None) -> PretrainedConfig:
    name = source.name
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"{name} is a folder without a config.json, so it holds no model. "
            "Fix: give the folder that save_pretrained wrote."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=False, **source.hub
        )
    except (OSError, ValueError, KeyError) as error:
        if adapter is not None:
            raise ModelError(
                f"the adapter {adapter.name} belongs to the base {name}, which cannot be reached: "
                f"{first_line(error)} Fix: download {name} and name its folder: "
                f"LLM2Vec.from_pretrained({adapter.name!r}, base='path/to/it')."
            ) from error
        raise ModelError(why(name, error)) from error
    vars(config).pop("auto_map", None)  # code from the hub is neither run nor pointed to
    return config


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    name = source.name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, **source.hub
        )
    except (OSError, ValueError, KeyError) as error:
        if Path(name).is_dir() and (Path(name) / "config.json").is_file():
            raise ModelError(
                f"{name} has a model but no tokenizer that can be read (tokenizer.json). "
                "Fix: save the tokenizer of the base model into the same folder."
            ) from error
        raise ModelError(why(name, error)) from error
    return tokenizer
