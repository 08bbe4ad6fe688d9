"""From a name to a transformer and its tokenizer: the hub, local folders, adapters, `nano`.

Nothing from a repository is executed: no remote code, safetensors only. Whatever goes wrong is told
as a `ModelError` with the fix.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unmasked import adapters
from unmasked.bidirectional import Report, open_config, open_mask, require
from unmasked.errors import ModelError, NotBidirectionalError

BUNDLED = "nano"
"""The name of the decoder that comes with the package."""


def bundled_path() -> Path:
    """Folder of the bundled decoder."""
    return Path(str(files("unmasked"))) / BUNDLED


def resolve_base(base: str | Path) -> str:
    """A folder or hub name; `nano` is the bundled decoder (a folder is ``./nano``)."""
    return str(bundled_path()) if str(base) == BUNDLED else str(base).rstrip("/") or "/"


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for a device: ``auto`` is bfloat16 on a GPU that has it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


@dataclass(frozen=True)
class Loaded:
    """A transformer, its tokenizer, and the proof (None if it was left causal on purpose)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: Report | None


def load(
    base: str | Path,
    peft: str | Path | list[str | Path] | None = None,
    enable_bidirectional: bool = True,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    allow_partial: bool = False,
    **hub: Any,
) -> Loaded:
    """Load a bare transformer, open its mask, prove it, and merge adapters into it.

    Args:
        base: `nano`, a folder or a hub name; a folder with an adapter stands for its base plus it.
        peft: adapter or adapters to merge, in this order.
        enable_bidirectional: False leaves the model as it was trained.
        dtype: of the weights.
        attention: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None lets transformers choose,
            and eager is tried where that choice stays causal.
        allow_partial: accept a model with causal mixing layers beside attention.
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ModelError: not found, no tokenizer, pickled weights, an adapter that does not fit.
        NotBidirectionalError: the proof failed.
    """
    name = resolve_base(base)
    chain = [] if peft is None else (peft if isinstance(peft, list) else [peft])
    if adapters.is_adapter(name, **hub):
        chain = [name, *chain]
        name = _adapter_base(name, **hub)
    config = _load_config(name, **hub)
    tokenizer = _load_tokenizer(name, **hub)
    attempts = [attention] if attention else [None, "eager"]
    for number, implementation in enumerate(attempts, start=1):
        live = open_config(config) if enable_bidirectional else config
        model = _load_model(name, live, dtype, implementation, **hub)
        report = open_mask(model) if enable_bidirectional else None
        try:
            if report is not None:
                require(report, allow_partial=allow_partial)
            break
        except NotBidirectionalError:
            if number == len(attempts) or report is None or report.attention == "eager":
                raise
    for adapter in chain:
        adapters.merge(model, resolve_base(adapter), **hub)
    return Loaded(model.eval(), tokenizer, report)


def load_causal_lm(
    base: str | Path, dtype: torch.dtype, attention: str | None = None, **hub: Any
) -> PreTrainedModel:
    """The base with its language-model head, mask open (for MNTP). The trunk must be proved.

    Raises:
        ModelError: the folder has no head, as one that was saved as an encoder.
    """
    from transformers import AutoModelForCausalLM

    name = resolve_base(base)
    config = open_config(_load_config(name, **hub))
    model, info = _load_model(
        name, config, dtype, attention, AutoModelForCausalLM, output_loading_info=True, **hub
    )
    if info["missing_keys"]:
        raise ModelError(
            f"{name} has no language-model head ({', '.join(sorted(info['missing_keys'])[:3])} "
            "missing), and MNTP predicts tokens. Fix: start MNTP from the decoder itself."
        )
    return model  # type: ignore[no-any-return]


def load_config(base: str | Path, **hub: Any) -> PretrainedConfig:
    """The config alone, mask open: nothing else is fetched.

    Raises:
        ModelError: there is none here or on the hub.
    """
    return open_config(_load_config(resolve_base(base), **hub))


def load_tokenizer(base: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: there is none here or on the hub.
    """
    return _load_tokenizer(resolve_base(base), **hub)


def _adapter_base(name: str, **hub: Any) -> str:
    base = adapters.read_config(name, **hub).base_model_name_or_path
    if not base:
        raise ModelError(
            f"{name} is an adapter that does not name its base. "
            "Fix: give the base first and the adapter as `peft`."
        )
    return resolve_base(base)


def _load_config(name: str, **hub: Any) -> PretrainedConfig:
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"{name} is a folder without a config.json, so it holds no model. "
            "Fix: give the folder that save_pretrained wrote."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_why(name, error)) from error
    return config


def _load_model(
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    auto: Any = AutoModel,
    **options: Any,
) -> Any:
    extra = {"attn_implementation": attention} if attention else {}
    try:
        return auto.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **extra,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_why(name, error)) from error


def _load_tokenizer(name: str, **hub: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, **hub
        )
    except (OSError, ValueError, KeyError) as error:
        if Path(name).is_dir() and (Path(name) / "config.json").is_file():
            raise ModelError(
                f"{name} has a model but no tokenizer that can be read (tokenizer.json). "
                "Fix: save the tokenizer of the base model into the same folder."
            ) from error
        raise ModelError(_why(name, error)) from error
    return tokenizer


def _why(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).exists():
        return f"cannot load {name}: {first}"
    return (
        f"cannot load {name}: it is no folder here, and the hub gave: {first} "
        f"Fix: check the name, or download the model and give its folder; '{BUNDLED}' is the "
        "model that comes with the package."
    )
