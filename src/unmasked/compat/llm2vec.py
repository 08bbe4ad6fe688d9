"""The calls of the original `llm2vec` package, so that its scripts run (`docs/migrating.md`).

What they mean is done elsewhere: this only translates names, positions and defaults.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmasked.errors import ModelError, unknown
from unmasked.forward.pooling import pool
from unmasked.text.tokens import TextTokenizer

if TYPE_CHECKING:
    from unmasked.checkpoint.folder import Settings
    from unmasked.forward.backbone import Backbone

logger = logging.getLogger(__name__)

HUB = ("revision", "token", "cache_dir", "local_files_only")


def loading_options(dtype: Any, device: str | None, kwargs: dict[str, Any]) -> tuple[str, Any, Any]:
    """(dtype, device, hub options) of a `from_pretrained` call in the original's words.

    Args:
        dtype: a name, perhaps with ``torch.`` before it, or a torch dtype.
        device: as given, or None.
        kwargs: ``torch_dtype``, ``device_map``, ``trust_remote_code`` and the hub's options.

    Raises:
        TypeError: an option is none of these.
        ModelError: a dtype or device map that cannot be used.
    """
    rest = dict(kwargs)
    dtype = str(rest.pop("torch_dtype", None) or dtype).removeprefix("torch.")
    device = device or _one_device(rest.pop("device_map", None))
    if rest.pop("trust_remote_code", False):
        logger.info("trust_remote_code is not needed: code from a repository is never run.")
    if strange := [key for key in rest if key not in HUB]:
        allowed = [*HUB, "torch_dtype", "device_map", "trust_remote_code"]
        raise TypeError(f"from_pretrained: {unknown('option', strange[0], allowed)}")
    return dtype, device, rest


def _one_device(device_map: Any) -> str | None:
    if isinstance(device_map, dict) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if device_map in (None, "auto"):
        return None
    if isinstance(device_map, str | torch.device) and str(device_map) not in (
        "balanced", "balanced_low_0", "sequential",
    ):  # fmt: skip
        return str(device_map)
    raise ModelError(
        f"device_map {device_map!r} spreads the model over devices, which is not supported. "
        "Allowed: one device, or auto. Fix: device='cuda'."
    )


def encode_options(
    compat: str | None, prompt_name: Any, prompt: Any, kwargs: dict[str, Any]
) -> tuple[str | None, str | None, dict[str, Any]]:
    """(prompt_name, prompt, options) of an `encode` call that may be in the original's order.

    It had ``batch_size`` and ``show_progress_bar`` where `SentenceTransformer` has prompt name and
    prompt; and it gave a tensor on the CPU, which ``compat`` brings back.
    """
    options = dict(kwargs)
    if isinstance(prompt_name, int):
        options["batch_size"], prompt_name = prompt_name, None
    if isinstance(prompt, bool):
        options["show_progress_bar"], prompt = prompt, None
    if compat and not options.get("convert_to_numpy"):
        options["convert_to_tensor"] = True
    return prompt_name, prompt, options


class OriginalNames:
    """Attributes and methods of the original's `LLM2Vec` that `SentenceTransformer` lacks."""

    settings: Settings

    if TYPE_CHECKING:

        @property
        def backbone(self) -> Backbone: ...

    @property
    def _tokens(self) -> TextTokenizer:
        return self.backbone.tokens

    @property
    def model(self) -> Any:
        """The transformer, perhaps a `PeftModel`."""
        return self.backbone.auto_model

    @property
    def pooling_mode(self) -> str:
        """How token states become a vector."""
        return self.settings.pooling_mode

    @property
    def skip_instruction(self) -> bool:
        """Whether only the text is pooled."""
        return self._tokens.skip_instruction

    @property
    def max_length(self) -> int:
        """Most tokens of an input."""
        return self._tokens.max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self._tokens.max_length = value

    @property
    def doc_max_length(self) -> int | None:
        """Most tokens of a text."""
        return self._tokens.doc_max_length

    @doc_max_length.setter
    def doc_max_length(self, value: int | None) -> None:
        self._tokens.doc_max_length = value

    def prepare_for_tokenization(self, text: str) -> str:
        """A text in its template."""
        template = self._tokens.template
        return template.prefix + text + template.suffix

    def tokenize(self, texts: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`preprocess`, with ``text_mask`` under the original's name, ``embed_mask``, too."""
        features: dict[str, Tensor] = self.preprocess(texts, **kwargs)  # type: ignore[attr-defined]
        return {**features, "embed_mask": features["text_mask"]}

    def get_pooling(self, features: dict[str, Tensor], last_hidden_states: Tensor) -> Tensor:
        """Pool padded states; padding may be on either side, and nothing is changed.

        Args:
            features: ``attention_mask`` and, to leave something out, ``embed_mask``: each (B, T).
            last_hidden_states: (B, T, D).

        Returns:
            (B, D).
        """
        attention = features["attention_mask"]
        mask = text_mask(features) if self.skip_instruction else attention
        rows, columns = attention.nonzero(as_tuple=True)
        positions = columns - attention.argmax(dim=1)[rows]
        return pool(
            last_hidden_states[rows, columns],
            rows,
            positions,
            mask[rows, columns].bool(),
            len(attention),
            self.pooling_mode,
            self._tokens.counted,
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """That of the transformer."""
        return self.model.resize_token_embeddings(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """That of the transformer."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)


def text_mask(features: dict[str, Any]) -> Tensor:
    """What is pooled, (B, T): ``text_mask``, or ``embed_mask`` as the original calls it, or all."""
    names = ("text_mask", "embed_mask", "attention_mask")
    mask: Tensor = next(features[name] for name in names if features.get(name) is not None)
    return mask
