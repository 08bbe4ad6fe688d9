"""Loads a transformer by name with an open, proved mask: hub, folders, adapters, ``nano``.

Nothing from a repository is executed: no remote code, and pickles only on request. Every failure is
raised as a `ModelError` with the fix. Loading has two steps, because the dtype depends on the
config: `find` reads everything but the weights, `load_transformer` reads the weights.

Cost: reading the weights once, and the proof (eleven forwards of a few tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unmasked.checkpoint import adapters
from unmasked.checkpoint.folder import (
    LENGTHS,
    LENGTHS_NAME,
    MODULES_NAME,
    PROMPTS_NAME,
    SETTINGS_NAME,
    Settings,
    check_count,
)
from unmasked.checkpoint.location import Location, locate, locate_adapter
from unmasked.checkpoint.weights import (
    faulty_config,
    load_model,
    require_finite,
    require_whole,
    with_first_layers,
)
from unmasked.errors import ModelError, NotBidirectionalError, first_line, nearest
from unmasked.mask.opening import check_length, open_config
from unmasked.mask.proof import Proof, open_mask, require


@dataclass(frozen=True)
class Found:
    """Everything of a checkpoint but its weights.

    Attributes:
        given: the location that was named: a decoder, an encoder or an adapter.
        trunk: the decoder below all adapters.
        chain: the adapters between `trunk` and `given`, in the order they were trained.
        added: the adapters that were given in addition, to be merged after `chain`.
        config: that of the decoder, unchanged.
        tokenizer: that of the checkpoint, unchanged.
        settings: content of the first `llm2vec_config.json` that exists, of the added adapters
            (last first), `given` and `trunk`; empty if there is none.
        options: content of `config_sentence_transformers.json`; empty if there is none.
        encoder: the location of the modules after the pooling, if there are any.
        layers: how many of the first layers to keep; None for all.
    """

    given: Location
    trunk: Location
    chain: Sequence[Location]
    added: Sequence[Location]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    options: dict[str, Any]
    encoder: Location
    layers: int | None = None

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """Length limits for queries and for documents; None where the encoder has no own limit.

        Raises:
            ModelError: a saved limit is not a number of tokens.
        """
        saved = self.encoder.read_json(LENGTHS_NAME)
        for name in LENGTHS:
            if saved.get(name) is not None:
                check_count(name, saved[name], "tokens", f"{self.encoder.name}/{LENGTHS_NAME}")
        query, document = (saved.get(name) for name in LENGTHS)
        return query, document

    @property
    def closed(self) -> bool:
        """Whether this is an encoder (not an adapter on one) that was saved with a closed mask."""
        is_encoder = bool(self.settings) and not [*self.chain, *self.added]
        return is_encoder and getattr(self.config, "is_causal", None) is True


def find(
    name: str | Path,
    peft: str | Path | list[str | Path] | None = None,
    base: str | Path | None = None,
    layers: int | None = None,
    **hub: Any,
) -> Found:
    """Read all of a checkpoint but its weights.

    Args:
        name: ``nano``, a folder or a hub name; an adapter is loaded together with its base.
        peft: an adapter or several to merge, in this order; ``OWNER/NAME@REVISION`` names a
            revision.
        base: the base of an adapter, if it is not where the adapter's config says.
        layers: keep only this many of the first layers; None keeps all.
        hub: ``revision`` (of `name`), ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ModelError: the checkpoint is not found, or has no tokenizer or too few layers.
    """
    given = locate(name, **hub).require()
    listed = peft if isinstance(peft, list) else [] if peft is None else [peft]
    added = [locate_adapter(item, **hub).require() for item in listed]
    trunk, chain = _resolve_chain(given, base)
    config = _load_config(trunk, given if chain else None)
    if layers is not None:
        config = with_first_layers(trunk.name, config, layers)
    tokenizer = _load_tokenizer(given if chain and given.has_tokenizer() else trunk)
    saved = (location.read_json(SETTINGS_NAME) for location in [*reversed(added), given, trunk])
    settings = next(filter(None, saved), {})
    # An adapter on an encoder does not repeat the prompts and modules of the encoder.
    encoder = given if given.fetch(MODULES_NAME) else trunk
    options = given.read_json(PROMPTS_NAME) or trunk.read_json(PROMPTS_NAME)
    return Found(given, trunk, chain, added, config, tokenizer, settings, options, encoder, layers)


def check_asked(found: Found, length: int | None) -> None:
    """Refuse a `max_length` that was given, beyond the positions of the model.

    Nobody has asked for the default, which is cut to the positions (`folder.within_positions`).

    Raises:
        ModelError: the length is too large.
    """
    if length is not None and length != Settings.max_length:
        check_length(length, found.config)


def load_transformer(
    found: Found,
    dtype: torch.dtype,
    attention: str | None = None,
    enable_bidirectional: bool | None = None,
    allow_partial: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, Proof | None]:
    """Load the bare transformer, open its mask, prove it, and merge the adapters into it.

    Args:
        found: the result of `find`.
        dtype: the dtype of the weights.
        attention: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None lets transformers choose,
            and tries eager if the model stays causal with that choice.
        enable_bidirectional: False leaves the model as it was trained; None opens it unless it is
            an encoder that was saved with its mask closed.
        allow_partial: accept a model in which some layers, or parts of them, stay causal.
        allow_pickle: read weights that exist only as pickles (tensors only, no code).

    Returns:
        The model in evaluation mode, and the proof; None if the mask was left closed.

    Raises:
        ModelError: pickled or missing weights, or an adapter that does not fit.
        NotBidirectionalError: the proof failed.
    """
    attempts = [attention] if attention else [None, "eager"]
    opens = not found.closed if enable_bidirectional is None else enable_bidirectional
    for number, implementation in enumerate(attempts, start=1):
        config = open_config(found.config) if opens else found.config
        try:
            model, missing = load_model(
                found.trunk,
                config,
                dtype,
                implementation,
                use_safetensors=None if allow_pickle else True,
            )
        except ModelError as error:
            if found.layers is None:
                raise
            raise ModelError(
                f"layers {found.layers}: the weights of {found.trunk.name} cannot be read for its "
                f"first layers alone ({first_line(error)}) Fix: keep all of them."
            ) from error
        require_whole(found.trunk.name, missing)
        require_finite(dict(model.named_parameters()), found.trunk.name)
        report = open_mask(model) if opens else None
        try:
            if report is not None:
                require(report, allow_partial=allow_partial)
            break
        except NotBidirectionalError:
            if number == len(attempts) or report is None or report.attention == "eager":
                raise
    adapters.merge(model, [*found.chain, *found.added], allow_pickle, found.layers)
    return model.eval(), report


def load_config(name: str | Path, layers: int | None = None, **hub: Any) -> PretrainedConfig:
    """The config of a decoder with its mask open, with all or its first layers; reads no weights.

    Raises:
        ModelError: the model is not found, or has too few layers.
    """
    config = open_config(_load_config(locate(name, **hub).require()))
    return config if layers is None else with_first_layers(str(name), config, layers)


def load_tokenizer(name: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a decoder, unchanged; nothing else is fetched.

    Raises:
        ModelError: the tokenizer is not found.
    """
    return _load_tokenizer(locate(name, **hub).require())


def load_causal_lm(
    name: str | Path, dtype: torch.dtype, attention: str | None = None, **hub: Any
) -> PreTrainedModel:
    """A decoder with its language-model head and an open mask, for MNTP; the caller proves it.

    Raises:
        ModelError: the folder has no head, because it was saved as an encoder.
    """
    from transformers import AutoModelForCausalLM

    location, _ = _resolve_chain(locate(name, **hub).require(), None)  # an adapter has no head
    config = open_config(_load_config(location))
    model, missing = load_model(location, config, dtype, attention, AutoModelForCausalLM)
    if missing:
        raise ModelError(
            f"{location.name} has no language-model head ({', '.join(missing[:3])} missing), and "
            "MNTP predicts tokens. Fix: start MNTP from the decoder itself."
        )
    return model  # type: ignore[no-any-return]


def _resolve_chain(given: Location, base: str | Path | None) -> tuple[Location, list[Location]]:
    """The decoder below a location, and the adapters in between, in the order of training."""
    trunk, chain = given, list[Location]()
    while adapters.is_adapter(trunk):
        chain.insert(0, trunk)
        config = adapters.read_adapter_config(trunk)
        below = base or config.base_model_name_or_path
        if not below:
            raise ModelError(
                f"{trunk.name} is an adapter that does not name its base. "
                "Fix: give the base first and the adapter as `peft`."
            )
        # The revision that was given is that of `given`; an adapter's config names its base's.
        hub = {key: value for key, value in given.hub.items() if key != "revision"}
        if config.revision and not base:
            hub["revision"] = config.revision
        trunk = locate(below if isinstance(below, Path) else str(below), **hub)
        try:
            trunk.require()
        except ModelError as error:
            raise _without_base(given, trunk, error) from error
        if any(trunk.name == passed.name for passed in chain):
            raise ModelError(
                f"{chain[-1].name} names itself as its base. "
                "Fix: base=MODEL, the decoder it was trained on."
            )
    return trunk, chain


def _without_base(adapter: Location, base: Location, error: Exception) -> ModelError:
    """The error for an adapter whose base cannot be reached because of `error`."""
    reason = first_line(error).partition(" Fix: ")[0]
    return ModelError(
        f"the adapter {adapter.name} belongs to the base {base.name}, which cannot be reached: "
        f"{reason} Fix: download {base.name} and name its folder: "
        f"LLM2Vec.from_pretrained({adapter.name!r}, base='path/to/it')."
    )


def _load_config(location: Location, adapter: Location | None = None) -> PretrainedConfig:
    name = location.name
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"{name} is a folder without a config.json, so it does not hold a model. "
            "Fix: give the folder that save_pretrained has written."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=False, **location.hub
        )
    except Exception as error:  # each family checks its config in its own way
        if unknown_family := _unknown_family(location):
            raise unknown_family from error
        if not isinstance(error, OSError | ValueError):
            raise faulty_config(location, error) from error
        if adapter is not None and not Path(name).is_dir():
            raise _without_base(adapter, location, error) from error
        raise location.unreadable(error) from error
    if hasattr(config, "auto_map"):
        del config.auto_map  # code from the hub is not run, and a saved config does not name it
    return config


def _unknown_family(location: Location) -> ModelError | None:
    """The error for a config with a family that transformers does not know; None if it does."""
    saved = location.read_json("config.json")
    family = saved.get("model_type")
    if not saved or family in CONFIG_MAPPING:
        return None
    given = f"{location.name}/config.json has no model_type."
    fix = "write the one that the model was saved with (llama, qwen3, ...) into it"
    if family:
        given = f"transformers {transformers.__version__} does not know the model_type '{family}' "
        given += f"of {location.name}/config.json{nearest(str(family), CONFIG_MAPPING)}"
        fix = "a newer transformers (pip install -U transformers), if it is a newer family"
    if "auto_map" in saved:
        fix = "name another model: code that comes with a model is not run here"
    return ModelError(f"{given} Fix: {fix}.")


def _load_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    name = location.name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, **location.hub
        )
    except Exception as error:  # each class of tokenizers has errors of its own
        if Path(name).is_dir() and (Path(name) / "config.json").is_file():
            raise ModelError(
                f"{name} has a model but no tokenizer that can be read (tokenizer.json). "
                "Fix: save the tokenizer of the base model into the same folder."
            ) from error
        raise location.unreadable(error) from error
    return tokenizer
