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
from unmasked.forward.compiling import LETTERS, compile_layers, is_compiled, pays
from unmasked.forward.packing import Packed, enable_packing, is_checked, pack, run_packed
from unmasked.forward.waiting import DeviceTime
from unmasked.mask.opening import decoder_of
from unmasked.text.templates import PLAIN
from unmasked.text.tokens import TextTokenizer, TokenRow


def listed(inputs: Any) -> list[Any]:
    """The inputs of `encode` as a list, also where they are a tuple, an array or a generator.

    Raises:
        DataError: they are not a sequence of inputs.
    """
    _refuse_container(inputs)
    if isinstance(inputs, Iterable) and not isinstance(inputs, bytes):
        with suppress(TypeError):  # an array without an axis
            return list(inputs)
    raise DataError(
        f"inputs are {_describe(inputs)}. Allowed: a string, a list of strings, or a list of "
        "[instruction, text] pairs. Fix: encode(['a text'])."
    )


def _refuse_container(inputs: Any) -> None:
    """Refuse what can be passed through and is no list of texts: columns, and sets."""
    if isinstance(inputs, set | frozenset):
        raise DataError(
            f"inputs are a {type(inputs).__name__}, which has no order, so nobody knows which "
            "vector is whose. Fix: encode(sorted(texts))."
        )
    names = inputs.keys() if isinstance(inputs, Mapping) else getattr(inputs, "column_names", None)
    if names is None:
        names = getattr(inputs, "columns", None)
    if names is not None and not callable(names):
        columns = [str(name) for name in names]
        column = "text" if "text" in columns or not columns else columns[0]
        raise DataError(
            f"inputs are a {type(inputs).__name__} of columns ({', '.join(columns[:10])}), and "
            f"the texts are one of them. Fix: encode(list(data[{column!r}]))."
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


logger = logging.getLogger(__name__)

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
        device_time: how long `encode` took so far, and what of it the device waited.
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
        self.device_time = DeviceTime()

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
        if self.packs_here():
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

    def prepare_for(self, inputs: Any, choice: str) -> None:
        """Compile the decoder layers where the inputs to come, and those before, pay for it.

        Args:
            inputs: of `encode`.
            choice: one of `compiling.CHOICES`.
        """
        model: Any = decoder_of(self.auto_model)
        if choice == "never" or is_compiled(model):
            return
        listed = [inputs] if isinstance(inputs, str) else inputs
        letters = sum(len(i) if isinstance(i, str) else sum(map(len, i[:2])) for i in listed)
        if pays(choice, model.device, self.tokens_encoded + letters // LETTERS):
            compile_layers(model)

    def packs_here(self) -> bool:
        """Whether batches are packed; on a new device or precision the check is made anew."""
        if self.unpackable is None:
            model: Any = decoder_of(self.auto_model)
            if not is_checked(model):
                self.unpackable = enable_packing(model)
                if self.unpackable is not None:
                    logger.warning("Batches are padded, which is slower: %s.", self.unpackable)
        return self.unpackable is None

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and tokenizer; `checkpoint.folder` writes the whole folder."""
        self.auto_model.save_pretrained(output_path)  # type: ignore[operator]
        self.tokenizer.save_pretrained(output_path)
