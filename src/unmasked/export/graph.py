"""The encoder as one graph with the pooling inside, for ONNX Runtime and OpenVINO.

The graph takes ``input_ids`` and ``attention_mask``, both (B, T) for any B and T, and returns
``sentence_embedding`` (B, D) and ``last_hidden_state`` (B, T, D); these are the names that stock
loaders and servers look for. Padding is on the right. In the mask, 0 is padding, 1 is a token, and
2 is a token that is attended to but not pooled, so that an instruction is left out exactly. Leading
special tokens (BOS) are never pooled, unless nothing else is left to pool.

transformers converts the model (`transformers.exporters`). Cost: one trace, a minute for a small
model, and the weights twice in memory.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unmasked.errors import MissingExtraError, ModelError, first_line
from unmasked.forward.backbone import collate
from unmasked.forward.pooling import after_pooling, check_mode
from unmasked.text.inputs import split_pairs
from unmasked.text.tokens import TextTokenizer, TokenRow

Weights = Literal["float32", "float16", "int8"]
OPSET = 18  # the ONNX opset that graphs are traced with, from which the converter makes others
OTHER_OPSET = (
    f"Fix: leave out --opset, for the newest that the converter writes, or --opset {OPSET}."
)
READ_ONLY = 2  # value in the attention mask of a token that is attended to but not pooled
FILES = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
"""Where stock sentence-transformers looks for a graph in a folder."""
ROWS = 8  # rows of a batch when a written graph is run
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
"""Packages of the extra ``export`` for each kind of graph; 8-bit weights also need ``nncf``."""


class VectorGraph(nn.Module):
    """A transformer and its pooling over padded batches.

    sentence-transformers' `Pooling` is not used: given a mask without BOS and the instruction, it
    would take these for padding on the left, and weight the text by other positions.

    Args:
        model: the bare transformer.
        mode: a pooling mode of `forward.pooling`.
        leading: number of special tokens before every text that are not pooled.
        behind: the modules behind the pooling.
    """

    def __init__(self, model: Any, mode: str, leading: int, behind: Sequence[Any] = ()) -> None:
        super().__init__()
        self.behind = nn.ModuleList(behind)
        self.model = model
        self.config = model.config
        self._mode = check_mode(mode)
        self._leading = leading

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Run the transformer and pool; the file's docstring has the names and shapes."""
        real = attention_mask > 0
        states = self.model(
            input_ids=input_ids, attention_mask=real.long(), use_cache=False
        ).last_hidden_state  # (B, T, D)
        positions = torch.arange(real.shape[1], device=real.device)
        text = (attention_mask == 1) & (positions >= self._leading)  # (B, T)
        pooled = text | (real & ~text.any(1, keepdim=True))  # everything if there is no text
        vectors = _pool_padded(states, pooled, positions, self._mode)
        vectors = after_pooling(self.behind, vectors)
        return {"sentence_embedding": vectors, "last_hidden_state": states}


def _pool_padded(states: Tensor, pooled: Tensor, positions: Tensor, mode: str) -> Tensor:
    """`forward.pooling.pool` for states padded on the right, with operators of every engine.

    Takes (B, T, D) states, the (B, T) tokens that are pooled, and (T,) positions from 0; returns
    (B, D) vectors, zeros for a row that is all padding.
    """
    if mode in ("mean", "weighted_mean"):
        weights = pooled.float() * (positions + 1 if mode == "weighted_mean" else 1)  # (B, T)
        sums = (states.float() * weights[..., None]).sum(1)
        return (sums / weights.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
    # The last pooled position; for bos_token, the factor makes it position 0.
    chosen = (pooled.long() * positions * (mode != "bos_token")).amax(1)  # (B,)
    index = chosen[:, None, None].expand(-1, 1, states.shape[2])  # (B, 1, D)
    return states.gather(1, index)[:, 0] * pooled.any(1, keepdim=True)


def graph_inputs(tokens: TextTokenizer, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """The inputs of a graph for token rows, each (B, T) int64."""
    features = collate(rows, int(tokens.tokenizer.pad_token_id))
    ids, attention, text = (features[n] for n in ("input_ids", "attention_mask", "text_mask"))
    if not tokens.skip_instruction:
        return {"input_ids": ids, "attention_mask": attention}
    # For an empty text, the text mask covers the whole row. Then no token is marked as text, and
    # the graph pools all of them, BOS included.
    whole_row = (text == attention).all(1, keepdim=True)  # (B, 1)
    pooled = text.bool() & ~whole_row
    return {"input_ids": ids, "attention_mask": torch.where(pooled, 1, attention * READ_ONLY)}


def write_graph(
    tokens: TextTokenizer,
    mode: str,
    model: Any,
    kind: Literal["onnx", "openvino"],
    folder: Path,
    weights: Weights,
    opset: int | None,
    behind: Sequence[nn.Module] = (),
) -> None:
    """Trace an encoder and write its graph.

    Args:
        tokens, mode: how texts become ids, and how states are pooled.
        model: the bare transformer with stock attention, float32, on the CPU.
        kind, folder: the format of the graph, and the folder of the encoder's other files.
        weights: ``float32``, ``float16``, or ``int8`` for 8-bit weights of the linear layers, with
            one scale per row and activations in float32.
        opset: the ONNX opset; None for the newest that the converter knows.
        behind: the modules behind the pooling, float32, on the CPU; not changed.

    Raises:
        MissingExtraError: the extra ``export`` is not installed.
        ModelError: the converter cannot convert this family, or onnx does not know the opset.
    """
    require_packages(*PACKAGES[kind], *(["nncf"] if weights == "int8" else []))
    leading = len(tokens.prefix) if tokens.skip_instruction else 0
    graph = VectorGraph(model, mode, leading, copy.deepcopy(behind)).eval()
    if (kind, weights) == ("onnx", "float16"):
        graph.half()
    rows = tokens(["and a text", "another text"], [tokens.join("a few words"), ""])
    inputs = graph_inputs(tokens, rows)
    exporter, config = _converter(kind, weights, opset)
    logger = logging.getLogger("torch.onnx")  # it warns of operators that this graph does not have
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between the converters
            exported = exporter.export(graph, inputs, config)
    except (AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"transformers cannot convert this {model.config.model_type} to {kind} "
            f"({first_line(error)}). Fix: --to tei or --to vllm, which run the weights themselves."
        ) from error
    finally:
        logger.setLevel(level)
    path = folder / FILES[kind]
    path.parent.mkdir(parents=True)
    exporter.save_program(exported.program, path)
    if kind == "onnx" and opset is not None:
        _check_written(path, opset)


def require_packages(*names: str) -> None:
    """Raise `MissingExtraError` if a package of the extra ``export`` is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, "export")


def _converter(kind: str, weights: Weights, opset: int | None) -> tuple[Any, Any]:
    """The exporter of transformers for a kind of graph, and its config."""
    exporters: Any = import_module("transformers.exporters")  # its names are created lazily
    auto = torch.export.Dim.AUTO
    axes = {name: {0: auto, 1: auto} for name in ("input_ids", "attention_mask")}
    given: dict[str, Any] = {"dynamic": True, "dynamic_shapes": axes}
    if weights == "int8":
        import nncf

        mode = nncf.CompressWeightsMode.INT8_SYM
        compression = exporters.NNCFWeightCompressionConfig(mode=mode)
        onnx = kind == "onnx"
        quantizer = exporters.NNCFOnnxQuantizer if onnx else exporters.NNCFOpenVINOQuantizer
        given["quantizer"] = quantizer(compression)
    if kind == "onnx":
        _check_known(opset)
        return exporters.OnnxExporter(), exporters.OnnxConfig(opset_version=opset, **given)
    half = weights == "float16"
    config = exporters.OpenVINOConfig(compress_to_fp16=half, stateful=False, **given)
    return exporters.OpenVINOExporter(), config


def _check_known(opset: int | None) -> None:
    """Refuse an opset that onnx does not know, before the conversion, which takes long."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OPSET <= opset <= newest:
        raise ModelError(f"ONNX opset {opset}: onnx here knows {OPSET} to {newest}. {OTHER_OPSET}")


def _check_written(path: Path, opset: int) -> None:
    """Refuse a graph of a lower opset than was asked for.

    The converter does not know every opset that onnx knows. For one that it does not know, it logs
    that, and writes a graph that may not be valid.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False)
    written = max(item.version for item in graph.opset_import if item.domain == "")
    if written < opset:
        raise ModelError(
            f"ONNX opset {opset}: the converter wrote one of {written}, as it does not know "
            f"{opset}. {OTHER_OPSET}"
        )


def load_graph(
    tokens: TextTokenizer, kind: str, path: Path
) -> Callable[[Sequence[tuple[str, str]]], np.ndarray]:
    """A function that runs a written graph, on the CPU, for (N, D) vectors of N pairs."""
    require_packages(PACKAGES[kind][-1])
    run = _onnx_session(path) if kind == "onnx" else _openvino_request(path)

    def vectors(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        texts, prompts = split_pairs([list(pair) for pair in pairs], tokens.join)
        rows, found = tokens(texts, prompts), []
        for start in range(0, len(rows), ROWS):  # padded batches of neighbours
            inputs = graph_inputs(tokens, rows[start : start + ROWS])
            found.append(run({name: value.numpy() for name, value in inputs.items()}))
        return np.concatenate(found).astype(np.float32)

    return vectors


def _onnx_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["sentence_embedding"], inputs)[0]


def _openvino_request(path: Path) -> Any:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    return lambda inputs: compiled(inputs)["sentence_embedding"]
