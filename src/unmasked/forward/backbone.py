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
from unmasked.forward.host.freed_memory import keep_freed_memory
from unmasked.forward.host.waiting import DeviceTime
from unmasked.forward.packing import Packed, enable_packing, is_checked, pack, run_packed
from unmasked.forward.pooling import LAYERS
from unmasked.forward.positions import longest_unscaled
from unmasked.mask.opening import check_length, decoder_of
from unmasked.text.inputs import is_count, requested_length, split_pairs
from unmasked.text.tokens import TextTokenizer, TokenRow

logger = logging.getLogger(__name__)

BY_TOKENS = "by_tokens"
"""Option of `encode`: limit each forward by its number of tokens, not of rows."""


@contextmanager
def _every_layer(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that the next forward fills with every layer's states, if the config asks for them."""
    layers: list[Tensor] = []
    if not getattr(model.config, "output_hidden_states", False):
        yield layers
        return
    hook = model.register_forward_hook(lambda _, __, output: layers.extend(output.hidden_states))
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
    """A bidirectional transformer, and the preprocessing that decides which tokens are pooled.

    Args:
        model: a transformer without a head (from `AutoModel`), perhaps wrapped by PEFT.
        tokens: turns texts into ids.
        unpackable: why batches must stay padded; None packs them if `packing.enable_packing`
            accepts the model.

    Attributes:
        longest_unscaled: texts of more tokens share no forward with shorter ones, see `positions`.
        query_length, document_length: most tokens of an input of `encode_query` and of
            `encode_document`; None for `max_seq_length`.
        tokens_encoded: tokens, without padding, that `encode` has processed; for measuring speed.
        device_time: the time spent in `encode`, and how much of it the device worked.
        texts_cut: how many texts `encode` has truncated.
        warns_of_cuts: whether the first truncated texts cause a warning.
    """

    forward_kwargs = {BY_TOKENS}  # noqa: RUF012 (sentence-transformers declares it like this)
    can_flatten_inputs = False  # the texts are laid end to end here, not by the tokenizer

    def __init__(
        self, model: nn.Module, tokens: TextTokenizer, unpackable: str | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keep_freed_memory()
        self.auto_model = model
        self.tokens = tokens
        self.unpackable = unpackable
        self.longest_unscaled = longest_unscaled(decoder_of(model).config)
        self.query_length: int | None = None
        self.document_length: int | None = None
        self.tokens_encoded = 0
        self.device_time = DeviceTime()
        self.texts_cut = 0
        self.warns_of_cuts = True

    def count_cut(self, texts: int, limit: int | None = None) -> None:
        """Count truncated texts, and log a warning with their limit for the first ones."""
        if texts and not self.texts_cut and self.warns_of_cuts:
            length, own = limit or self.tokens.max_length, self.tokens.doc_max_length
            name = "max_length" if own is None or own >= length else "doc_max_length"
            logger.warning(
                "%s longer than %s (%d tokens): only the beginning counts. Fix: a larger "
                "%s, or passages (unmasked encode --chunk). This is said only once.",
                "A text is" if texts == 1 else f"{texts:,} texts are",
                name,
                min(length, own or length),
                name,
            )
        self.texts_cut += texts

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.tokens.tokenizer

    @property
    def model(self) -> nn.Module:
        """The transformer without adapters; the stock module has this name for it."""
        bare: nn.Module = decoder_of(self.auto_model)
        return bare

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, or of those that are not quantized."""
        model: Any = self.auto_model
        dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def max_seq_length(self) -> int:
        return self.tokens.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if not is_count(value):
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
        """Token rows of strings or pairs; `prompt` is put before inputs without their own."""
        texts, prompts = split_pairs(inputs, self.tokens.join)
        return self.tokens(texts, [p or prompt or "" for p in prompts], max_length)

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Padded features of token rows.

        Raises:
            ModelError: the tokenizer yields an id for which the model has no embedding.
        """
        pad_id = int(self.tokenizer.pad_token_id or 0)  # any id will do: padding is masked
        features = collate(rows, pad_id)
        highest = int(features["input_ids"].max())
        config: Any = self.auto_model.config
        embeddings = int(config.get_text_config().vocab_size)
        if highest >= embeddings:
            raise ModelError(
                f"the tokenizer yields token {highest} "
                f"('{self.tokenizer.convert_ids_to_tokens(highest)}'), but the model has only "
                f"{embeddings} embeddings. Fix: use the tokenizer that was saved with the model."
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
            prompt: put before inputs that have no instruction of their own.
            max_length: most tokens of an input, for this call.
            processing_kwargs: the same, as sentence-transformers passes it: ``{"text":
                {"max_length": N}}``.
            task: ``query`` or ``document``; each may have a limit of its own.

        Returns:
            The features of `collate`. If every text begins at the same position, and that is not 0,
            also this position as ``prompt_length``, for stock pooling modules and losses; our own
            pooling reads the ``text_mask`` of each row.

        Raises:
            DataError: an unknown option in `processing_kwargs`.
        """
        limit = self.limit(processing_kwargs, max_length, task)
        return self.features_of(self.tokenize_inputs(inputs, prompt, limit))

    def limit(
        self,
        options: Mapping[str, Any] | None,
        max_length: int | None = None,
        task: str | None = None,
    ) -> int | None:
        """Most tokens of an input, by the arguments of `preprocess`; None for `max_seq_length`."""
        of_task = {"query": self.query_length, "document": self.document_length}
        if asked := requested_length(options):
            check_length(asked, self.auto_model.config)
        return asked or max_length or of_task.get(task or "")

    def features_of(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """The features of `collate`, and ``prompt_length`` as `preprocess` describes it."""
        starts = {row.start for row in rows}
        length = starts.pop() if len(starts) == 1 else 0
        return {**self.collate(rows), **({"prompt_length": length} if length else {})}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Run the transformer over the real tokens.

        Args:
            features: as `preprocess` makes them. ``repad: False`` leaves out the padded
                ``token_embeddings``.

        Returns:
            The features, ``token_embeddings`` (B, T, D), and what pooling reads: states (N, D),
            row, position and "is text" of the N real tokens. If the model's config has
            ``output_hidden_states`` (the stock `AdaptiveLayerLoss` sets it), also
            ``all_layer_embeddings``, each (B, T, D). Everything is then written into the given
            features, as the stock module does, because that loss runs the pooling again on them.
        """
        ids, attention = features["input_ids"], features["attention_mask"]
        packs = self.packs_here()  # before the hook, because its check runs the model too
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
                rows, columns = attention.nonzero(as_tuple=True)  # (N,) each
                positions = columns - attention.argmax(dim=1)[rows]  # from the first real token
                states = padded[rows, columns]  # (N, D)

        def repad(states: Tensor) -> Tensor:
            """(N, D) states to (B, T, D), with zeros for padding."""
            return states.new_zeros(*ids.shape, states.shape[1]).index_put((rows, columns), states)

        outputs = {
            "packed_states": states,
            "packed_rows": rows,
            "packed_positions": positions,
            "packed_is_text": self._text_mask(features)[rows, columns].bool(),
        }
        if features.get("repad", True):
            outputs["token_embeddings"] = repad(states) if padded is None else padded
        if not layers:
            return {**features, **outputs}
        if packs:  # each layer has states (1, N, D)
            layers = [repad(layer[0]) for layer in layers]
        features.update({**outputs, LAYERS: layers, "packed_columns": columns})
        return features

    def prepare_for(self, inputs: Any, choice: str) -> None:
        """Compile the decoder layers if what was encoded so far and these inputs pay for it.

        Args:
            inputs: the inputs of a call of `encode`.
            choice: one of `compiling.CHOICES`.
        """
        if choice == "never" or is_compiled(decoder_of(self.auto_model)):
            return
        listed = [inputs] if isinstance(inputs, str) else inputs
        # A pair may have a third item, which is not a text.
        characters = sum(len(i) if isinstance(i, str) else sum(map(len, i[:2])) for i in listed)
        self.compile_for(self.tokens_encoded + characters // LETTERS, choice)

    def compile_for(self, tokens: int, choice: str, training: bool = False) -> bool:
        """Compile the decoder layers if a number of tokens pays for it.

        Args:
            tokens: roughly how many are processed in all.
            choice: one of `compiling.CHOICES`.
            training: whether gradients are needed.

        Returns:
            Whether the layers are compiled now.
        """
        model: Any = decoder_of(self.auto_model)
        if not is_compiled(model) and pays(choice, model.device, tokens):
            self.packs_here()  # first, because packing changes the forward that is compiled
            compile_layers(model, training=training)
        return bool(getattr(model, "layers_compiled", False))

    def packs_here(self) -> bool:
        """Whether batches are packed; a new device or precision is checked first."""
        if self.unpackable is None:
            model: Any = decoder_of(self.auto_model)
            if not is_checked(model):
                self.unpackable = enable_packing(model)
                if self.unpackable is not None:
                    logger.warning("Batches are padded, which is slower: %s.", self.unpackable)
        return self.unpackable is None

    def _text_mask(self, features: Mapping[str, Any]) -> Tensor:
        """(B, T) mask of the text tokens, also for features made by a stock tokenizer module."""
        attention: Tensor = features["attention_mask"]
        if "text_mask" in features or not self.tokens.skip_instruction:
            return features.get("text_mask", attention)  # type: ignore[no-any-return]
        given = features.get("prompt_length", len(self.tokens.prefix))
        start = int(torch.as_tensor(given).flatten()[0])
        text = attention * (attention.cumsum(dim=1) > start)
        return torch.where(text.any(dim=1, keepdim=True), text, attention)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Refuse: a folder of this module alone would not say what is pooled.

        Raises:
            ModelError: always; `TextEncoder.save` writes the whole folder.
        """
        raise ModelError(
            "this module can only be saved as part of an LLM2Vec. Fix: append other modules to it: "
            "model = LLM2Vec.from_pretrained(...); model.append(Normalize()); model.save(...)."
        )


# Stock code that uses the first module (`AdaptiveLayerLoss`) checks that it is a `Transformer`.
# `Backbone` has what such code uses: model, auto_model, tokenizer, lengths, all_layer_embeddings.
Transformer.register(Backbone)
