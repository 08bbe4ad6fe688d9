"""One served model: from the inputs of a request to rows of token ids, and from rows to vectors.

Tokenising (`text.tokens`) and the forward pass (`forward.loop`) are those of `encode`. This file
adds only what a request may choose: the prompt, cutting, and the length of a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unmasked.errors import DataError, ModelError, unknown
from unmasked.forward.compiling import LONG_WORK
from unmasked.forward.loop import running
from unmasked.model import TextEncoder
from unmasked.serve.wire import Body, ModelAnswer, Refusal, Texts
from unmasked.text.tokens import TextTokenizer, TokenRow

BY_TYPE = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names of prompts that `encode_query` and `encode_document` of sentence-transformers look for."""

FEW_IDS, OWN = 64, 0.9
"""`OWN` is the value of `own_share` below which ids are taken for another tokenizer's; inputs with
fewer than `FEW_IDS` ids are not judged.

On four or more Wikipedia sentences, English and Korean, three tokenizers gave 1.00 for their own
ids. For ids of OpenAI's cl100k they gave 0.84 in English (median) and 0.22 to 0.74 in Korean.
"""
AS_TEXTS = (
    "Fix: send texts, or ids of the model's own tokenizer (LangChain sends ids of another one, "
    "unless check_embedding_ctx_length=False is set)."
)


def own_share(tokens: TextTokenizer, inputs: Sequence[Sequence[int]]) -> float:
    """The share of ids that stay the same when they are decoded and tokenised again, 0 to 1."""
    same = total = 0
    for ids in inputs:
        text = tokens.backend.decode(ids, skip_special_tokens=False)
        again = tokens.backend.encode(text, add_special_tokens=False).ids
        same += (Counter(ids) & Counter(again)).total()
        total += max(len(ids), len(again))
    return same / max(total, 1)


class ServedModel:
    """A loaded encoder and its name.

    Args:
        encoder: is put into evaluation mode for good. Its layers are compiled here if it was
            loaded with that option.
        max_tokens: maximum tokens per input, if lower than the model's own limit.
        truncate: whether a text that is too long is cut if the request does not say what to do.
    """

    def __init__(
        self, name: str, encoder: TextEncoder, max_tokens: int | None = None, truncate: bool = False
    ) -> None:
        self.name, self.encoder, self.truncate = name, encoder.eval(), truncate
        own = encoder.backbone.tokens.max_length
        self.max_tokens = min(own, max_tokens or own)
        self.width = encoder.get_embedding_dimension() or 0
        config: Any = encoder.backbone.auto_model.config
        self._vocabulary = int(config.get_text_config().vocab_size)
        tokens = encoder.backbone.tokens
        known = tokens.backend.encode("Some words, as they are read.", add_special_tokens=False).ids
        # Foreign ids can only be recognised if this tokenizer restores its own ids after decoding.
        self._decodes = own_share(tokens, [known]) >= OWN
        if encoder.backbone.compile_for(LONG_WORK, encoder.compiles):  # a server's work has no end
            self._warm_up()

    def _warm_up(self) -> None:
        """Run one batch of each kind, so that no request waits for compilation."""
        long = "word " * self.max_tokens
        for texts in ([""], ["", ""], ["a", "b c", "d"], [long], [long, ""]):
            self.vectors(self.encoder.backbone.tokens(texts, max_length=self.max_tokens))

    def described(self, created: int) -> ModelAnswer:
        """The model's entry in ``/v1/models``."""
        prompts = [name for name, prompt in self.encoder.prompts.items() if prompt]
        return ModelAnswer(
            id=self.name,
            created=created,
            dimensions=self.width,
            max_tokens=self.max_tokens,
            prompts=prompts,
        )

    def prompt(self, asked: Body) -> str:
        """The text before every input, chosen as by `encode`.

        Raises:
            Refusal: the model has no prompt of the given name.
        """
        if asked.prompt is not None:
            return asked.prompt
        prompts, name = self.encoder.prompts, asked.prompt_name
        if name is not None and name not in prompts:
            raise Refusal(400, unknown("prompt", name[:64], prompts), "no_prompt", "prompt_name")
        if asked.input_type is not None:
            known = (name for name in BY_TYPE[asked.input_type] if name in prompts)
            name = next(known, self.encoder.default_prompt_name)
        name = name or self.encoder.default_prompt_name
        return (prompts[name] or "") if name is not None else ""

    def rows(self, inputs: Texts, asked: Body, prompt: str) -> list[TokenRow]:
        """Token rows of the inputs of a request; runs in a worker thread.

        Raises:
            Refusal: an input is too long, an id is not in the model's vocabulary or the ids are of
                another tokenizer, or the prompt leaves no room for a text.
        """
        backbone = self.encoder.backbone
        try:
            if isinstance(inputs, str) or isinstance(inputs[0], str):
                texts = [inputs] if isinstance(inputs, str) else inputs
                rows = backbone.tokenize_inputs(texts, prompt, self.max_tokens)
            else:
                several: Any = inputs if isinstance(inputs[0], list) else [inputs]
                rows = [self._row_of_ids(ids, prompt) for ids in several]
                # The beginning of the first inputs is enough, and bounds the cost.
                self._check_own([ids[: 8 * FEW_IDS] for ids in several[:FEW_IDS]])
        except DataError as error:
            raise Refusal(400, str(error), "invalid_input") from None
        truncate = self.truncate if asked.truncate is None else asked.truncate
        for index, row in enumerate(rows):
            if row.cut and not truncate:
                raise Refusal(
                    400,
                    # Only the beginning of a very long text is tokenised, so it may have more.
                    f"input {index} has at least {len(row.ids) + row.cut} tokens, but {self.name} "
                    f"takes {len(row.ids)} of such an input. Fix: a shorter text, or "
                    '"truncate": true to cut off its end.',
                    "context_length_exceeded",
                )
        return rows

    def _row_of_ids(self, ids: Sequence[int], prompt: str) -> TokenRow:
        largest = max(ids, default=0)
        if largest >= self._vocabulary:
            raise Refusal(
                400,
                f"token {largest} is not one of the {self._vocabulary} of {self.name}. {AS_TEXTS}",
                "invalid_token",
            )
        return self.encoder.backbone.tokens.of_ids(ids, prompt, self.max_tokens)

    def _check_own(self, inputs: Sequence[Sequence[int]]) -> None:
        """Refuse ids of another tokenizer: in this model's vocabulary they mean other words."""
        can_judge = self._decodes and sum(map(len, inputs)) >= FEW_IDS
        if can_judge and own_share(self.encoder.backbone.tokens, inputs) < OWN:
            said = f"these are not the ids that the tokenizer of {self.name} gives for their text."
            raise Refusal(400, f"{said} {AS_TEXTS}", "foreign_tokens")

    def vectors(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """(N, D) float32 vectors of N rows.

        Raises:
            ModelError: a number is not finite, as happens if float16 overflows.
        """
        encoder = self.encoder
        found = running.encode_rows(encoder, encoder.backbone, rows, encoder.device)
        if not torch.isfinite(found).all():
            raise ModelError("the model gave numbers that are not finite. Fix: --dtype bfloat16.")
        return np.asarray(found.numpy())

    def finish(self, vectors: np.ndarray, dimensions: int | None, normalize: bool) -> np.ndarray:
        """Vectors cut to `dimensions` (by default the encoder's), scaled to length 1 if asked."""
        shorter = dimensions or self.encoder.truncate_dim
        return np.asarray(running.finish(torch.from_numpy(vectors), shorter, normalize).numpy())

    def check_dimensions(self, dimensions: int | None) -> None:
        """Refuse more dimensions than a vector has."""
        if dimensions is not None and dimensions > self.width:
            said = f"dimensions is {dimensions}; {self.name} has {self.width}. Fix: give fewer."
            raise Refusal(400, said, "invalid_dimensions", "dimensions")
