"""The encoder as one graph with the pooling inside, for ONNX Runtime and OpenVINO.

The graph takes ``input_ids`` and ``attention_mask``, both (B, T) of any B and T, and gives
``sentence_embedding`` (B, D) and ``last_hidden_state`` (B, T, D); these are the names that stock
loaders and servers look for. Padding is to the right. In the mask, 0 is padding, 1 a token, and 2 a
token that is read and not pooled: so an instruction is left out exactly. Leading special tokens
(BOS) are left out without being told; where nothing would be left, everything is pooled.

The conversion is transformers' own (`transformers.exporters`). Cost: one trace, a minute for a
small model, and the weights twice in memory.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
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
from unmasked.forward.pooling import check_mode
from unmasked.text.inputs import split_pairs
from unmasked.text.tokens import TextTokenizer, TokenRow

Weights = Literal["float32", "float16", "int8"]
READ_ONLY = 2
"""In the mask of a graph: a token that is read and not pooled."""
FILES = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
"""Where stock sentence-transformers looks for a graph in a folder."""


PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
"""What the extra ``export`` has for each kind of graph; ``nncf`` for weights of 8 bits."""


class VectorGraph(nn.Module):
    """A transformer and its pooling over padded batches.

    Not the stock `Pooling`: of a mask without BOS and instruction it takes these for padding to the
    left, and weighs the tokens behind them by other positions.

    Args:
        model: the bare transformer.
        mode: a pooling mode of `forward.pooling`.
        leading: number of special tokens before every text, which are not pooled; 0 if they are.
    """

    def __init__(self, model: Any, mode: str, leading: int) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._mode = check_mode(mode)
        self._leading = leading

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """See the module's text for names and shapes."""
        real = attention_mask > 0
        states = self.model(
            input_ids=input_ids, attention_mask=real.long(), use_cache=False
        ).last_hidden_state  # (B, T, D)
        positions = torch.arange(real.shape[1], device=real.device)
        text = (attention_mask == 1) & (positions >= self._leading)
        pooled = text | (real & ~text.any(1, keepdim=True))
        vectors = _pool_padded(states, pooled, positions, self._mode)
        return {"sentence_embedding": vectors, "last_hidden_state": states}


def _pool_padded(states: Tensor, pooled: Tensor, positions: Tensor, mode: str) -> Tensor:
    """`forward.pooling.pool` of (B, T, D) states, in operators that every engine has.

    Args:
        states: padded to the right.
        pooled: (B, T) which tokens are pooled.
        positions: (T,) from 0.
        mode: as there.

    Returns:
        (B, D) vectors; zeros for a row that is all padding.
    """
    if mode in ("mean", "weighted_mean"):
        weights = pooled.float() * (positions + 1 if mode == "weighted_mean" else 1)  # (B, T)
        sums = (states.float() * weights[..., None]).sum(1)
        return (sums / weights.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
    chosen = pooled.long() * positions * (mode != "bos_token")
    last = chosen.amax(1)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, last)[:, 0] * pooled.any(1, keepdim=True)


def graph_inputs(tokens: TextTokenizer, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """The inputs of a graph for token rows, each (B, T) int64."""
    features = collate(rows, int(tokens.tokenizer.pad_token_id))
    attention, text = features["attention_mask"], features["text_mask"]
    mask = torch.where(text.bool(), attention, attention * READ_ONLY)
    if not tokens.skip_instruction:
        return {"input_ids": features["input_ids"], "attention_mask": attention}
    whole = (text == attention).all(1, keepdim=True)  # "": its context is pooled, BOS as well
    return {
        "input_ids": features["input_ids"],
        "attention_mask": torch.where(whole, attention * READ_ONLY, mask),
    }


def write_graph(
    tokens: TextTokenizer,
    mode: str,
    model: Any,
    kind: Literal["onnx", "openvino"],
    folder: Path,
    weights: Weights = "float32",
    opset: int | None = None,
) -> Path:
    """Trace an encoder and write its graph.

    Args:
        tokens: how texts become ids.
        mode: the pooling mode.
        model: the bare transformer with stock attention, float32, on the CPU.
        kind: which graph.
        folder: where the encoder's other files are.
        weights: ``float32``; ``float16``; ``int8``: linear layers with 8-bit weights, one scale
            per row, and numbers of 32 bits between them.
        opset: the ONNX opset; None for the newest that the converter knows.

    Returns:
        The file that was written.

    Raises:
        MissingExtraError: the extra ``export`` is not installed.
        ModelError: the converter cannot convert this family.
    """
    require_packages(*PACKAGES[kind], *(["nncf"] if weights == "int8" else []))
    leading = len(tokens.prefix) if tokens.skip_instruction else 0
    model = model.half() if (kind, weights) == ("onnx", "float16") else model
    graph = VectorGraph(model, mode, leading).eval()
    rows = tokens(["and a text", "another text"], [tokens.join("a few words"), ""])
    inputs = graph_inputs(tokens, rows)
    exporter, config = _converter(kind, weights, opset)
    notes = logging.getLogger("torch.onnx")  # of operators that this graph does not have
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes among the converters
            exported = exporter.export(graph, inputs, config)
    except (AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"transformers cannot convert this {model.config.model_type} to {kind} "
            f"({first_line(error)}). Fix: --to tei or --to vllm, which run the weights themselves."
        ) from error
    finally:
        notes.setLevel(level)
    path = folder / FILES[kind]
    path.parent.mkdir(parents=True)
    exporter.save_program(exported.program, path)
    return path


def require_packages(*names: str) -> None:
    """Refuse to begin without a package of the extra ``export``."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, "export")


def _converter(kind: str, weights: Weights, opset: int | None) -> tuple[Any, Any]:
    """The exporter of transformers and its config."""
    exporters: Any = import_module("transformers.exporters")  # its names are made when asked for
    auto = torch.export.Dim.AUTO
    axes = {name: {0: auto, 1: auto} for name in ("input_ids", "attention_mask")}
    given: dict[str, Any] = {"dynamic": True, "dynamic_shapes": axes}
    if weights == "int8":
        import nncf

        mode = nncf.CompressWeightsMode.INT8_SYM
        how = exporters.NNCFWeightCompressionConfig(mode=mode)
        onnx = kind == "onnx"
        make = exporters.NNCFOnnxQuantizer if onnx else exporters.NNCFOpenVINOQuantizer
        given["quantizer"] = make(how)
    if kind == "onnx":
        return exporters.OnnxExporter(), exporters.OnnxConfig(opset_version=opset, **given)
    half = weights == "float16"
    config = exporters.OpenVINOConfig(compress_to_fp16=half, stateful=False, **given)
    return exporters.OpenVINOExporter(), config


class GraphRunner:
    """Runs a written graph on the CPU, one text at a time or several.

    Args:
        tokens: how texts become ids.
        kind: which graph.
        path: its file.
    """

    def __init__(self, tokens: TextTokenizer, kind: str, path: Path) -> None:
        self._tokens = tokens
        require_packages(PACKAGES[kind][-1])
        self._run = _onnx_session(path) if kind == "onnx" else _openvino_request(path)

    def vectors(self, pairs: Sequence[tuple[str, str]], rows_at_once: int = 8) -> np.ndarray:
        """(N, D) vectors of N ``(instruction, text)`` pairs, in padded batches as they come."""
        texts, prompts = split_pairs([list(pair) for pair in pairs], self._tokens.join)
        rows = self._tokens(texts, prompts)
        found = []
        for start in range(0, len(rows), rows_at_once):
            inputs = graph_inputs(self._tokens, rows[start : start + rows_at_once])
            found.append(self._run({name: value.numpy() for name, value in inputs.items()}))
        return np.concatenate(found).astype(np.float32)


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
