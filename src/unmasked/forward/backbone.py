"""The one way from texts to hidden states: tokenise, pad into a batch, drop the padding, run.

Encoding, training and evaluating all go through `Backbone`. It is the first module of a
`TextEncoder` and the only place that calls the transformer. Cost: that of the transformer on the
real tokens of a batch; padding is dropped before the first layer.

Shapes: B rows of a batch, T tokens of its longest row, N real tokens of all rows, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn

from unmasked.errors import DataError, ModelError
from unmasked.forward.packing import Packed, pack, run_packed
from unmasked.text.templates import PLAIN
from unmasked.text.tokens import TextTokenizer, TokenRow

logger = logging.getLogger(__name__)


def listed(inputs: Any) -> list[Any]:
    """The inputs of `encode` as a list, also where they are a tuple, an array or a generator.

    Raises:
        DataError: they are not a sequence of inputs.
    """
    if isinstance(inputs, Iterable) and not isinstance(inputs, Mapping | bytes):
        with suppress(TypeError):  # an array without an axis
            return list(inputs)
    raise DataError(
        f"inputs are {_describe(inputs)}. Allowed: a string, a list of strings, or a list of "
        "[instruction, text] pairs. Fix: encode(['a text'])."
    )


def split_pairs(
    inputs: Sequence[Any], join: Callable[[str], str] = PLAIN.join
) -> tuple[list[str], list[str]]:
    """(texts, prompts) of inputs that are all strings, or all ``[instruction, text]`` pairs.

    Args:
        inputs: the inputs.
        join: how an instruction becomes a prompt.

    Raises:
        DataError: an input is neither, or strings and pairs are mixed; names the index.
    """
    pairs = bool(inputs) and isinstance(inputs[0], list | tuple)
    texts, prompts = [], []
    for index, item in enumerate(inputs):
        if isinstance(item, str) and not pairs:
            texts.append(item)
            prompts.append("")
        elif pairs and isinstance(item, list | tuple) and _is_pair(item):
            texts.append(item[1])
            prompts.append(join(item[0]))
        else:
            expected = "an [instruction, text] pair like the first" if pairs else "a string"
            raise DataError(
                f"input {index} is {_describe(item)}, expected {expected}. "
                "Allowed: all strings, or all [instruction, text] pairs. "
                "Fix: give texts without an instruction as ['', text]."
            )
        if not (prompts[-1].isascii() and texts[-1].isascii()):
            _check_whole(index, prompts[-1] + texts[-1])
    return texts, prompts


def _check_whole(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"input {index} has half a surrogate pair ({text[error.start]!r}), which is not a "
            "character. Fix: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


def _is_pair(item: Sequence[Any]) -> bool:
    # The original package also passed [instruction, text, 0]; its third item has no meaning.
    return len(item) in (2, 3) and isinstance(item[0], str) and isinstance(item[1], str)


def _describe(item: Any) -> str:
    of = f" of {len(item)}" if isinstance(item, list | tuple) else ""
    return f"{type(item).__name__}{of}"


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """Right-padded batch of token rows.

    Returns:
        ``input_ids``, ``attention_mask`` and ``text_mask``, each (B, T) int64.
    """
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)  # (B, T)
    attention = np.zeros_like(ids)
    text = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        attention[index, : len(row.ids)] = 1
        text[index, row.start : row.stop] = 1
    arrays = {"input_ids": ids, "attention_mask": attention, "text_mask": text}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


BY_TOKENS = "by_tokens"
"""Option of `encode` that fills each forward up to a number of tokens, not of rows."""


class Backbone(InputModule):
    """A bidirectional transformer behind the preprocessing that decides what is pooled.

    Args:
        model: a bare transformer (`AutoModel`), perhaps wrapped by PEFT.
        tokens: how texts become ids.
        unpackable: why batches stay padded; None if `packing.enable_packing` accepted the model.

    Attributes:
        tokens_encoded: real tokens that went through `encode` so far, for measuring speed.
        texts_cut: texts of `encode` so far that were longer than an input.
    """

    forward_kwargs = {BY_TOKENS}  # noqa: RUF012 (sentence-transformers declares it like this)

    def __init__(
        self, model: nn.Module, tokens: TextTokenizer, unpackable: str | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.auto_model = model
        self.tokens = tokens
        self.unpackable = unpackable
        self.tokens_encoded = 0
        self.texts_cut = 0

    def count_cut(self, texts: int) -> None:
        """Take note of texts that were longer than an input; the first ones are told of."""
        if texts and not self.texts_cut:
            logger.warning(
                "%s longer than max_length (%d tokens): only the beginning counts. Fix: a larger "
                "max_length, or passages (unmasked encode --chunk; corpus.encode_passages). "
                "This is said once; texts_cut counts on.",
                "A text is" if texts == 1 else f"{texts:,} texts are",
                self.tokens.max_length,
            )
        self.texts_cut += texts

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.tokens.tokenizer

    @property
    def max_seq_length(self) -> int:
        return self.tokens.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokens.max_length = value

    def get_embedding_dimension(self) -> int:
        config: Any = self.auto_model.config
        return int(config.get_text_config().hidden_size)

    def tokenize_inputs(
        self, inputs: Sequence[Any], prompt: str | None = None, max_length: int | None = None
    ) -> list[TokenRow]:
        """Rows of ids of strings or pairs; `prompt` is put before each that has none of its own."""
        texts, prompts = split_pairs(inputs, self.tokens.join)
        return self.tokens(texts, [p or prompt or "" for p in prompts], max_length)

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Padded features of token rows.

        Raises:
            ModelError: the tokenizer yields an id for which the model has no embedding.
        """
        features = collate(rows, int(self.tokenizer.pad_token_id))
        most = int(features["input_ids"].max())
        config: Any = self.auto_model.config
        known = int(config.get_text_config().vocab_size)
        if most >= known:
            raise ModelError(
                f"the tokenizer yields token {most} "
                f"('{self.tokenizer.convert_ids_to_tokens(most)}'), but the model has only {known} "
                "embeddings. Fix: use the tokenizer that was saved with the model."
            )
        return features

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        *,
        max_length: int | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        return self.collate(self.tokenize_inputs(inputs, prompt, max_length))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Run the transformer over the real tokens.

        Args:
            features: as `preprocess` makes them. With ``repad: False`` among them the padded
                ``token_embeddings`` are not made.

        Returns:
            The features, ``token_embeddings`` (B, T, D), and what pooling reads: states (N, D),
            row, position and "is text" of the N real tokens.
        """
        ids, attention = features["input_ids"], features["attention_mask"]
        if self.unpackable is None:
            packed: Packed = features.get("packed") or pack(attention)
            rows, columns, positions = packed.rows, packed.columns, packed.positions
            states = run_packed(self.auto_model, ids, packed)  # (N, D)
            padded = None
        else:
            padded = self.auto_model(
                input_ids=ids, attention_mask=attention, use_cache=False
            ).last_hidden_state  # (B, T, D)
            rows, columns = attention.nonzero(as_tuple=True)
            positions = columns - attention.argmax(dim=1)[rows]
            states = padded[rows, columns]
        if features.get("repad", True):
            if padded is None:
                padded = states.new_zeros(*ids.shape, states.shape[1])
                padded = padded.index_put((rows, columns), states)
            features = {**features, "token_embeddings": padded}
        return {
            **features,
            "packed_states": states,
            "packed_rows": rows,
            "packed_positions": positions,
            "packed_is_text": features.get("text_mask", attention)[rows, columns].bool(),
        }

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and tokenizer; `checkpoint.folder` writes the whole folder."""
        self.auto_model.save_pretrained(output_path)  # type: ignore[operator]
        self.tokenizer.save_pretrained(output_path)
