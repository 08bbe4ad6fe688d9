"""The recipe: every setting of a run, in one schema. The text below a setting is its reference.

A recipe is a YAML file with one section per stage. A key that is not in the schema is an error
that names the line, because a misspelt learning rate costs a day of GPU time. Paths in a recipe
are relative to the folder in which the command runs, not to the folder of the recipe.

Defaults are the numbers of the LLM2Vec paper (arXiv 2404.05961) and its published configurations.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from unmasked.recipe.anchors import Anchor
from unmasked.recipe.lora import Lora
from unmasked.recipe.teaching import Teacher, named_teacher
from unmasked.recipe.values import (
    STRICT,
    Arguments,
    AtLeastTwo,
    Count,
    Dropout,
    NotNegative,
    Positive,
    Seed,
    Share,
    Strings,
    Whole,
    data_sets,
    number,
)

CAUSAL, BIDIRECTIONAL, BEFORE = "causal_", "bidirectional", "before this stage"
"""Names, in the scores of a run, of the encoders before the first stage: the prefix for the causal
decoder (one for each pooling), the opened decoder, a base with adapters or an open mask already."""


class _Section(BaseModel):
    model_config = STRICT


class Model(_Section):
    """The decoder to start from, and how it encodes."""

    base: Annotated[str, Field(min_length=1)]
    """Name on the Hugging Face hub, folder, or ``nano`` for the bundled decoder."""
    adapters: Strings = []
    """Adapters that are merged into the base before the first stage, in this order."""
    bidirectional: bool = True
    """Open the causal mask. False trains and saves the decoder with its mask closed."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the default branch."""
    licence: str | None = None
    """Licence of the base; for information only."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; ``auto`` keeps that of the checkpoint if the device supports it."""
    attention: str | None = None
    """Attention implementation by its name in transformers, such as ``sdpa`` or ``eager``."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether to compile the decoder layers for a stage; ``auto`` does on a single GPU, for a stage
    of 6.5 million tokens or more. Compiled layers are compared with the plain ones first."""
    pooling: Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"] = "mean"
    """How token states become one vector; the paper finds ``mean`` best without a causal mask."""
    include_instruction: bool | None = None
    """Pool BOS and the instruction too, as engines do; None: as in the base (a decoder: false)."""
    max_length: AtLeastTwo = 512
    """Maximum number of tokens of an input to the saved encoder, with the instruction."""
    allow_partial: bool = False
    """Accept a model in which some layers provably stay causal, such as a hybrid."""
    layers: Count | None = None
    """Keep only this many of the first layers of the base; None keeps all."""


class Training(_Section):
    """Settings that all stages have: optimiser (AdamW), schedule and how often to report."""

    held_out: Whole = 200
    """Number of texts or rows that are not trained on, to measure the loss on."""
    steps: Count = 1000
    """Number of optimiser steps."""
    gradient_accumulation: Count = 1
    """Number of batches per optimiser step."""
    learning_rate: Positive = 5e-5
    """Highest learning rate, which is reached after warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to zero after warm-up."""
    schedule_steps: Count | None = None
    """Step at which the learning rate would reach zero; None takes ``steps``. In the paper it falls
    over three epochs, but training stops at step 1000, when it has hardly fallen."""
    warmup_steps: Whole = 0
    """Number of steps in which the learning rate rises from zero."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """A gradient with a larger norm is scaled down to this norm."""
    lora: Lora = Lora()
    """The adapter that this stage trains."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_steps: Count = 10
    """Number of steps between two lines of metrics."""
    eval_steps: Count = 100
    """Number of steps between two measurements of the held-out loss."""
    save_steps: Count = 200
    """Number of steps between two checkpoints, from which an interrupted run continues."""
    trainer: Arguments = {}
    """Other arguments of ``TrainingArguments`` in transformers, by name. They take precedence."""

    @model_validator(mode="after")
    def _horizon(self) -> Training:
        horizon = self.schedule_steps or self.steps
        if horizon < self.steps and self.schedule != "constant":
            raise ValueError(
                f"schedule_steps {horizon} should be null or at least the {self.steps} steps, "
                "or the learning rate would be zero for the rest"
            )
        if self.warmup_steps >= horizon:
            raise ValueError(f"warmup_steps {self.warmup_steps} should be less than {horizon}")
        return self


class TextTraining(Training):
    """A stage that trains on plain texts."""

    data: Strings = []
    """Files of texts (.txt, .jsonl, .csv, .tsv, each also as .gz or .zst; .parquet), folders of
    them, or data sets on the hub (hf:NAME); a single one needs no list. ``FILE:text=body`` names
    the column of the texts. The texts of MNTP may be larger than memory."""
    max_texts: Count | None = None
    """Maximum number of texts to read; None reads all."""


class MNTP(TextTraining):
    """Masked next token prediction (paper section 2.1): the state at i-1 predicts token i."""

    batch_size: Count = 32
    """Number of blocks per batch, divided among the devices."""
    block_length: AtLeastTwo = 512
    """Number of tokens per block. Blocks are cut from the concatenated texts."""
    documents: Literal["joined", "apart"] = "joined"
    """Whether the texts in a block see each other (``joined``, as in the paper) or each text sees
    only itself, with positions from 0, as in encoding (``apart``)."""
    micro_batch_tokens: Count | None = None
    """Maximum number of tokens per forward. A larger batch is divided into equal parts, which gives
    the same gradient in less memory, so gradient checkpointing is seldom needed. None takes 2048 on
    a CPU and 16384 on a GPU."""
    mask_token: Literal["blank", "eos", "mask"] = "blank"
    """What replaces a masked token if the tokenizer has no mask token: ``_`` (as in the paper), the
    end-of-text token, or a new token."""
    mask_style: Literal["bert", "all"] = "bert"
    """``bert`` masks 80 % of the chosen tokens, replaces 10 % by random ones and keeps 10 %;
    ``all`` masks all of them."""
    mask_probability: Share = 0.2
    """Share of the tokens that are chosen; the paper takes 0.2 (Mistral: 0.8 with ``all``)."""

    @model_validator(mode="after")
    def _own_mask(self) -> MNTP:
        if self.mask_token == "mask" and self.lora.method == "full":
            raise ValueError(
                "mask_token mask adds an embedding, which lora.method full would save too. "
                "Fix: mask_token: blank"
            )
        return self


class SimCSE(TextTraining):
    """Unsupervised contrastive training (paper section 2.1): the same text with two dropouts."""

    batch_size: AtLeastTwo = 128
    """Number of texts per batch, divided among the devices; all other texts are negatives."""
    max_length: AtLeastTwo = 128
    """Texts are cut to this many tokens."""
    learning_rate: Positive = 3e-5
    """Highest learning rate, which is reached after warm-up."""
    log_steps: Count = 50
    """Number of steps between two lines of metrics."""
    eval_steps: Count = 200
    """Number of steps between two measurements of the held-out loss."""
    temperature: Positive = 0.05
    """Cosines are divided by this number before the softmax."""
    attention_dropout: Dropout = 0.3
    """Probability of dropout on the attention weights: the noise by which the two views differ."""
    embedding_dropout: Dropout = 0.0
    """Probability of dropout on the embeddings of the tokens, for models without attention dropout.
    The dropout of the adapter, ``lora.dropout``, has no effect while the adapter is zero."""

    @model_validator(mode="after")
    def _noise(self) -> SimCSE:
        lora = 0.0 if self.lora.method == "full" else self.lora.dropout
        if not (self.attention_dropout or self.embedding_dropout or lora):
            raise ValueError(
                "no dropout, so the two views would be identical. Fix: attention_dropout: 0.3"
            )
        return self


class Pairs(_Section):
    """A data set of queries and texts that answer them, with the instructions for both."""

    path: Annotated[str, Field(min_length=1)]
    """A .jsonl, .csv or .tsv file (each also as .gz or .zst), a .parquet file, a folder of such
    files, or a data set on the hub, which is streamed: ``OWNER/NAME``, ``hf:NAME``, or
    ``hf:NAME:SUBSET:SPLIT``."""
    subset: str | None = None
    """Subset of a data set on the hub if the path names none; None takes its only one."""
    split: str = "train"
    """Split of a data set on the hub if the path names none."""
    query: str | None = None
    """Column of the query; None finds it by its name (``query``, ``anchor``, ``question`` and other
    common names)."""
    positive: str | None = None
    """Column of the text, or of a list of texts, that answers the query; None finds it by its name
    (``positive``, ``pos``, ``answer`` and other common names)."""
    negative: Strings = []
    """Columns of texts, or lists of texts, that do not answer the query. Without any, all columns
    with a common name (``negative``, ``negatives``, ``neg``, ``hard_negatives``, ``negative_1`` to
    ``negative_n`` and others) are used, if there are any."""
    instruction: Strings = []
    """Put before every query and never pooled. Of several, row i takes the i-th, in a cycle."""
    document_instruction: Strings = []
    """Put before every positive and negative. Retrieval usually has none."""
    symmetric: bool = False
    """Both sides are texts of the same kind, so documents take the instruction of their query."""
    teacher: str | None = None
    """Column of a teacher's scores or vectors, if ``supervised.teacher`` reads them; None finds it
    by its name (``scores``, ``score``, or ``pos_scores`` and ``neg_scores``; ``vectors``)."""
    weight: Positive = 1.0
    """How often each row is used per epoch; 0.5 uses a different half of the rows in each epoch."""
    max_rows: Count | None = None
    """Maximum number of rows to read; None reads all."""

    @model_validator(mode="after")
    def _one_side(self) -> Pairs:
        if self.symmetric and self.document_instruction:
            raise ValueError("symmetric and document_instruction cannot be combined")
        return self


class Supervised(Training):
    """Contrastive training on pairs, with hard negatives if there are any (paper section 3.2)."""

    data: Annotated[list[Pairs], BeforeValidator(data_sets)] = []
    """Data sets, each with the settings below or only its path; a single one needs no list.
    ``FILE:query=anchor,positive=text`` names columns after a path. A batch has rows of one data
    set."""
    batch_size: AtLeastTwo = 512
    """Rows per batch, divided among the devices; the documents of all other rows are negatives."""
    hard_negatives: Whole = 1
    """Maximum number of negatives per row."""
    max_length: AtLeastTwo = 512
    """Texts are cut to this many tokens, with the instruction."""
    learning_rate: Positive = 2e-4
    """Highest learning rate, which is reached after warm-up."""
    warmup_steps: Whole = 300
    """Number of steps in which the learning rate rises from zero."""
    log_steps: Count = 50
    """Number of steps between two lines of metrics."""
    eval_steps: Count = 200
    """Number of steps between two measurements of the held-out loss."""
    temperature: Positive = 0.02
    """Cosines are divided by this number before the softmax."""
    mini_batch_tokens: Count | None = None
    """Maximum number of tokens per forward. A larger batch is embedded twice, first without
    gradients (GradCache, arXiv 2101.06983), in the memory of one such forward. None runs every
    batch in one forward."""
    false_negative_margin: NotNegative | None = None
    """Leave out negatives whose cosine to the query exceeds that of the positive by more than this
    margin. None leaves out only the query itself and its answers in the batch."""
    matryoshka: list[Count] = []
    """Numbers of leading dimensions that are trained as vectors of their own (arXiv 2205.13147)."""
    matryoshka_layers: list[Count] = []
    """Numbers of first layers that are trained as encoders of their own (arXiv 2402.14776), each
    with all of ``matryoshka``. Each costs another forward through its layers."""
    teacher: Annotated[Teacher | None, BeforeValidator(named_teacher)] = None
    """A better model to learn from; the name of an encoder is short for ``{model: NAME}``. None
    learns from the pairs alone."""
    merge_with_base: Annotated[float, Field(ge=0, lt=1), BeforeValidator(number)] = 0.0
    """Weight of the encoder from before this stage in a weighted mean with the trained one, against
    forgetting: 0.3 takes 0.7 of the trained weights and 0.3 of the earlier ones. 0 keeps the
    trained encoder."""


class Evaluate(_Section):
    """What is scored before the first stage and after each stage."""

    tasks: Strings = []
    """Task files and folders."""
    bootstrap: Whole = 1000
    """Number of resamples for each confidence interval; 0 computes no intervals."""


AnyStage = MNTP | SimCSE | Supervised


class Recipe(_Section):
    """Every setting of a run. Without a stage the model is only converted and evaluated."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Name of the run folder: letters, digits, ``.``, ``_`` and ``-``."""
    seed: Seed = 42
    """Seed of the order of the data, of masking, dropout and the initial weights of adapters."""
    model: Model
    """The decoder to start from."""
    mntp: MNTP | None = None
    """First stage; None leaves it out."""
    simcse: SimCSE | None = None
    """Second stage; None leaves it out."""
    supervised: Supervised | None = None
    """Third stage; None leaves it out."""
    evaluate: Evaluate = Evaluate()
    """What is scored."""
    published_data: dict[Literal["mntp", "simcse"], Strings] = {}
    """The texts of the published figures, by stage; ``unmasked reproduce`` uses them for a stage
    without data."""
    anchors: list[Anchor] = []
    """Published figures, cheapest first: ``unmasked reproduce`` scores on their tasks."""
    trackers: list[Literal["wandb", "trackio"]] = []
    """Where to send metrics besides ``metrics.jsonl`` and TensorBoard, which are always written."""

    @model_validator(mode="after")
    def _continued(self) -> Recipe:
        before: Lora | None = None
        for name, stage in self.stages():
            lora, same = stage.lora, {"start": "continue"}
            if lora.start == "continue" and lora != (before and before.model_copy(update=same)):
                problem = "has other settings" if before else "does not exist"
                raise ValueError(
                    f"{name}.lora.start continue: the adapter of the stage before {problem}. "
                    "Fix: the same lora settings in both, or start: new"
                )
            before = lora
        return self

    @model_validator(mode="after")
    def _apart(self) -> Recipe:
        of_base = [anchor.folder for anchor in self.published()]
        if len(set(of_base)) < len(of_base):
            raise ValueError("anchors: two of one base have the same benchmark. Fix: rename one.")
        return self

    def published(self) -> list[Anchor]:
        """The anchors of this recipe's base."""
        return [anchor for anchor in self.anchors if anchor.base == self.model.base]

    def stages(self) -> list[tuple[str, AnyStage]]:
        """Name and settings of the stages that are not left out, in the order they run."""
        named = {"mntp": self.mntp, "simcse": self.simcse, "supervised": self.supervised}
        return [(name, stage) for name, stage in named.items() if stage is not None]
