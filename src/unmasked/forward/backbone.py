"""The one way from texts to hidden states: tokenise, pad into a batch, drop the padding, run.

Encoding, training and evaluating all go through `Backbone`. It is the first module of a
`TextEncoder` and the only place that calls the transformer. Cost: that of the transformer on the
real tokens of a batch; padding is dropped before the first layer.

Shapes: B rows of a batch, T tokens of its longest row, N real tokens of all rows, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule, Transformer
from torch import Tensor, nn

from unmasked.errors import ModelError
from unmasked.forward.compiling import LETTERS, compile_layers, is_compiled, pays
from unmasked.forward.packing import Packed, enable_packing, is_checked, pack, run_packed
from unmasked.forward.pooling import LAYERS
from unmasked.forward.waiting import DeviceTime
from unmasked.mask.opening import check_length, decoder_of
from unmasked.text.inputs import requested_length, split_pairs
from unmasked.text.tokens import TextTokenizer, TokenRow

logger = logging.getLogger(__name__)

BY_TOKENS = "by_tokens"
"""Option of `encode` that fills each forward up to a number of tokens, not of rows."""


@contextmanager
def _every_layer(model: nn.Module) -> Iterator[list[Tensor]]:
    """In the block, the list takes the states of every layer, where the config asks for them."""
    layers: list[Tensor] = []
    if not getattr(model.config, "output_hidden_states", False):
        yield layers
        return
    hook = model.register_forward_hook(lambda *call: layers.extend(call[-1].hidden_states))
    try:
        yield layers
    finally:
        hook.remove()


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


class Backbone(InputModule):
    """A bidirectional transformer behind the preprocessing that decides what is pooled.

    Args:
        model: a bare transformer (`AutoModel`), perhaps wrapped by PEFT.
        tokens: how texts become ids.
        unpackable: why batches stay padded; None if `packing.enable_packing` accepted the model.

    Attributes:
        query_length, document_length: limits for the inputs of `encode_query`, `encode_document`;
            None for the limit of all.
        tokens_encoded: real tokens that went through `encode` so far, for measuring speed.
        device_time: how long `encode` took so far, and what of it the device waited.
        texts_cut: texts of `encode` so far that were longer than an input.
    """

    forward_kwargs = {BY_TOKENS}  # noqa: RUF012 (sentence-transformers declares it like this)
    can_flatten_inputs = False  # the texts are laid end to end here, not by the tokenizer

    def __init__(
        self, model: nn.Module, tokens: TextTokenizer, unpackable: str | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.auto_model = model
        self.tokens = tokens
        self.unpackable = unpackable
        self.query_length: int | None = None
        self.document_length: int | None = None
        self.tokens_encoded = 0
        self.device_time = DeviceTime()
        self.texts_cut = 0

    def count_cut(self, texts: int) -> None:
        """Take note of texts that were longer than an input; the first ones are told of."""
        if texts and not self.texts_cut:
            logger.warning(
                "%s longer than max_length (%d tokens): only the beginning counts. Fix: a larger "
                "max_length, or passages (unmasked encode --chunk). Later texts are not told of.",
                "A text is" if texts == 1 else f"{texts:,} texts are",
                self.tokens.max_length,
            )
        self.texts_cut += texts

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.tokens.tokenizer

    @property
    def model(self) -> nn.Module:
        """The bare transformer, below an adapter, by the name that the stock module has for it."""
        bare: nn.Module = decoder_of(self.auto_model)
        return bare

    @property
    def max_seq_length(self) -> int:
        return self.tokens.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"max_seq_length {value!r}: an encoder cuts texts at some number of tokens. "
                "Fix: a number of 1 or more, as large as the model takes."
            )
        check_length(value, self.auto_model.config)
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
        features = collate(
            rows, int(self.tokenizer.pad_token_id or 0)
        )  # padding is never looked at
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
        processing_kwargs: Mapping[str, Any] | None = None,
        task: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Features of strings or pairs.

        Args:
            inputs: B strings, or B pairs.
            prompt: put before each that has none of its own.
            max_length: overrides the limit of an input for this call.
            processing_kwargs: the same as sentence-transformers has it: ``{"text": {"max_length":
                N}}``.
            task: ``query`` or ``document``, for limits of their own.

        Returns:
            As `collate`, and ``prompt_length``, as the stock module has it, for other people's
            pooling and losses: the number of tokens before the text, where that is one number
            greater than 0; ``text_mask`` says it for each row.

        Raises:
            DataError: another option among the `processing_kwargs`.
        """
        limit = self.limit(processing_kwargs, max_length, task)
        return self.features_of(self.tokenize_inputs(inputs, prompt, limit))

    def limit(
        self,
        options: Mapping[str, Any] | None,
        max_length: int | None = None,
        task: str | None = None,
    ) -> int | None:
        """The limit of the inputs of a call, as `preprocess` takes it; None for that of all."""
        of_task = {"query": self.query_length, "document": self.document_length}
        if asked := requested_length(options):
            check_length(asked, self.auto_model.config)
        return asked or max_length or of_task.get(task or "")

    def features_of(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """`collate`, with the ``prompt_length`` that `preprocess` describes."""
        starts = {row.start for row in rows}
        length = starts.pop() if len(starts) == 1 else 0
        return {**self.collate(rows), **({"prompt_length": length} if length else {})}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Run the transformer over the real tokens.

        Args:
            features: as `preprocess` makes them. With ``repad: False`` among them the padded
                ``token_embeddings`` are not made.

        Returns:
            The features, ``token_embeddings`` (B, T, D), and what pooling reads: states (N, D),
            row, position and "is text" of the N real tokens. Where the model's config asks for
            ``output_hidden_states``, as the stock `AdaptiveLayerLoss` makes it, also
            ``all_layer_embeddings``, each (B, T, D); all is then put into the given features, as
            the stock module does, because that loss calls again with the same ones.
        """
        ids, attention = features["input_ids"], features["attention_mask"]
        packs = self.packs_here()  # its check runs the model as well
        with _every_layer(self.auto_model) as layers:
            if packs:
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

        def repad(states: Tensor) -> Tensor:
            return states.new_zeros(*ids.shape, states.shape[1]).index_put((rows, columns), states)

        found = {
            "packed_states": states,
            "packed_rows": rows,
            "packed_positions": positions,
            "packed_is_text": self._text_mask(features)[rows, columns].bool(),
        }
        if features.get("repad", True):
            found["token_embeddings"] = repad(states) if padded is None else padded
        if not layers:
            return {**features, **found}
        deep = layers if padded is not None else [repad(layer[0]) for layer in layers]
        features.update({**found, LAYERS: deep, "packed_columns": columns})
        return features

    def prepare_for(self, inputs: Any, choice: str) -> None:
        """Compile the decoder layers where the inputs to come, and those before, pay for it.

        Args:
            inputs: of `encode`.
            choice: one of `compiling.CHOICES`.
        """
        if choice == "never" or is_compiled(decoder_of(self.auto_model)):
            return
        listed = [inputs] if isinstance(inputs, str) else inputs
        letters = sum(len(i) if isinstance(i, str) else sum(map(len, i[:2])) for i in listed)
        self.compile_for(self.tokens_encoded + letters // LETTERS, choice)

    def compile_for(self, tokens: int, choice: str, training: bool = False) -> bool:
        """Compile the decoder layers where a number of tokens pays for it.

        Args:
            tokens: that are to come, roughly.
            choice: one of `compiling.CHOICES`.
            training: whether gradients are wanted.

        Returns:
            Whether the layers are compiled now.
        """
        model: Any = decoder_of(self.auto_model)
        if not is_compiled(model) and pays(choice, model.device, tokens):
            self.packs_here()  # what is compared is what will run
            compile_layers(model, training=training)
        return bool(getattr(model, "layers_compiled", False))

    def packs_here(self) -> bool:
        """Whether batches are packed; on a new device or precision the check is made anew."""
        if self.unpackable is None:
            model: Any = decoder_of(self.auto_model)
            if not is_checked(model):
                self.unpackable = enable_packing(model)
                if self.unpackable is not None:
                    logger.warning("Batches are padded, which is slower: %s.", self.unpackable)
        return self.unpackable is None

    def _text_mask(self, features: Mapping[str, Any]) -> Tensor:
        """(B, T), also of features that another model's preprocessing made of the same tokens."""
        attention: Tensor = features["attention_mask"]
        if "text_mask" in features or not self.tokens.skip_instruction:
            return features.get("text_mask", attention)  # type: ignore[no-any-return]
        given = features.get("prompt_length", len(self.tokens.prefix))
        start = int(torch.as_tensor(given).flatten()[0])
        text = attention * (attention.cumsum(dim=1) > start)
        return torch.where(text.any(dim=1, keepdim=True), text, attention)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Refused: a folder of this module alone would not say what is pooled.

        Raises:
            ModelError: always; `TextEncoder.save` writes the whole folder.
        """
        raise ModelError(
            "this module is saved by LLM2Vec only. Fix: put other modules behind the encoder, as "
            "in model = LLM2Vec.from_pretrained(...); model.append(Normalize()); model.save(...)."
        )


# Stock code that reaches into its own `Transformer` (`AdaptiveLayerLoss`) asks whether this is one.
# It has what that class shows: model, auto_model, tokenizer, lengths, `all_layer_embeddings`.
Transformer.register(Backbone)
