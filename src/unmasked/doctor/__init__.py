"""What this machine and a model can do, one fact a line, for people and for bug reports.

`environment` says what is installed and where it runs. `examine` loads a model and looks: is it
really bidirectional, how far does it see, what does its tokenizer add, and would a stock loader
find the border between each saved prompt and a text? Cost: loading the model once.

Facts are plain values, ready for JSON; `lines` makes text of them.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

from unmasked import __version__
from unmasked.errors import ModelError, NotBidirectionalError

if TYPE_CHECKING:
    from unmasked.bidirectional import Report
    from unmasked.model import LLM2Vec

Facts = dict[str, Any]

LIBRARIES = ("torch", "transformers", "sentence-transformers", "peft")
PROBES = ("foo", "A sentence.", " after a space", '"quoted"', "1984", "한국어 문장", "\nnew line")
"""Beginnings of texts that merge with what stands before them in one tokenizer or another."""


def environment() -> Facts:
    """Versions, devices and extras."""
    import torch

    found: Facts = {"unmasked": __version__, "python": platform.python_version()}
    found |= {name: _version(name) or "not installed" for name in LIBRARIES}
    found["platform"] = platform.platform(terse=True)
    found["devices"] = _devices()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    bfloat16 = [n for n in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(n)]
    found["cpu_bfloat16"] = ", ".join(bfloat16) or "no (slow: emulated; use float32)"
    for extra, packages in _extras().items():
        missing = [name for name in packages if _version(name) is None]
        install = f"pip install 'unmasked[{extra}]' ({', '.join(missing)} missing)"
        found[f"extra_{extra}"] = install if missing else "installed"
    return found


def examine(name: str) -> Facts:
    """Load a model and look at it.

    Returns:
        Facts; ``bidirectional`` is whether it can be used.

    Raises:
        ModelError: it cannot be loaded at all.
    """
    from unmasked.model import LLM2Vec

    try:
        model = LLM2Vec.from_pretrained(name, allow_partial=True)
        report = model.report
    except NotBidirectionalError as error:
        report = error.report
        try:
            model = LLM2Vec.from_pretrained(name, enable_bidirectional=False)
        except (ModelError, RuntimeError):  # it fails even as it is: the report says how
            return {"model": name, **_proof(report)}
    return {"model": name, **_proof(report), **_shape(model), **_tokens(model)}


def lines(found: Facts) -> list[tuple[str, str]]:
    """Label and text of each fact."""
    rows = []
    for key, value in found.items():
        if isinstance(value, dict):
            rows += [(f"{key.replace('_', ' ')} {name}", _shown(v)) for name, v in value.items()]
        else:
            rows.append((key.replace("_", " "), _shown(value)))
    return rows


def _shown(value: object) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """The packages of each extra, as our own metadata lists them."""
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires("unmasked") or []
    except importlib.metadata.PackageNotFoundError:
        return {}  # run from a checkout
    extras: dict[str, list[str]] = {}
    for requirement in map(Requirement, listed):
        names = str(requirement.marker or "").split("extra == ")[1:]
        for extra in (name.strip("\"'() ") for name in names):
            if extra != "dev":
                extras.setdefault(extra, []).append(requirement.name)
    return extras


def _devices() -> list[str]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
        found.append(
            f"cuda:{index} {gpu.name} {gpu.total_memory / 2**30:.0f} GiB {bfloat16} bfloat16"
        )
    if torch.backends.mps.is_available():
        found.append("mps")
    capability = torch.backends.cpu.get_cpu_capability()
    return [*found, f"cpu {capability} {torch.get_num_threads()} threads"]


def _proof(report: Report) -> Facts:
    found = report.as_dict()
    return {
        "model_type": found["model_type"],
        "bidirectional": report.verdict != "impossible",
        "verdict": report.verdict,
        "reason": report.reason,
        "causal_layers": found["causal_layers"],
        "padding_drift": found["padding_drift"],
        "attention": report.attention,
    }


def _shape(model: LLM2Vec) -> Facts:
    decoder: Any = model.backbone.auto_model
    config = decoder.config.get_text_config()
    parameters = list(decoder.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    return {
        "parameters": sum(p.numel() for p in parameters),
        "memory": f"{size / 2**20:,.1f} MiB of weights",
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "packed": model.backbone.unpackable or "yes: packed and single forwards agree",
        "device": str(model.device),
        "dtype": dtype,
        "dtype_why": model.precision.reason if model.precision else "as given",
        "sliding_window": getattr(config, "sliding_window", None),
        "max_positions": getattr(config, "max_position_embeddings", None),
        "pooling": model.settings.pooling_mode,
        "max_length": model.settings.max_length,
    }


def _tokens(model: LLM2Vec) -> Facts:
    from unmasked.train.mntp import find_mask_id

    tokens = model.backbone.tokens
    tokenizer: Any = tokens.tokenizer
    try:
        mask_id = find_mask_id(tokenizer, "blank")
        mask = tokenizer.convert_ids_to_tokens(mask_id)
    except ModelError:
        mask = "none: '_' is no single token; train with mntp.mask_token=mask"
    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
    return {
        "vocabulary": len(tokenizer),
        "bos_added": tokenizer.convert_ids_to_tokens(tokens.prefix),
        "eos": tokenizer.eos_token,
        "eos_added": bool(tokens.suffix),
        "padding": tokenizer.pad_token,
        "mntp_mask": mask,
        "prompt": {name: _judge(tokenizer, prompt) for name, prompt in prompts.items()},
    }


def _judge(tokenizer: Any, prompt: str) -> str:
    """Whether a stock loader finds where this prompt ends, by tokenising it alone."""
    alone = tokenizer(prompt)["input_ids"]
    if alone and alone[-1] in tokenizer.all_special_ids:
        alone = alone[:-1]  # as sentence-transformers does
    merged = [p for p in PROBES if tokenizer(prompt + p)["input_ids"][: len(alone)] != alone]
    if not merged:
        return f"stable in stock loaders: {prompt!r}"
    return f"UNSTABLE in stock loaders: {prompt!r} merges with {merged[0]!r}; end it in a newline"
