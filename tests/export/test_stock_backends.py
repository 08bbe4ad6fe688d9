"""Stock sentence-transformers runs exported graphs, with the versions that its backends need.

Optimum follows transformers with a delay: its package for ONNX needs transformers 4, and that for
OpenVINO an early 5. They are installed into an environment of their own, over the libraries here.
"""

from __future__ import annotations

import subprocess
import sysconfig
import venv

import numpy as np
import pytest

from unmasked import LLM2Vec
from unmasked.export.exporting import export_model

VERSIONS = {
    "onnx": (
        "optimum==2.1.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "tokenizers==0.22.2",
        "huggingface-hub==0.36.2", "sentence-transformers==5.2.3", "datasets==3.6.0",
        "accelerate==1.11.0", "peft==0.17.1",
    ),
    "openvino": (
        "optimum==2.3.0", "optimum-intel==2.2.0", "transformers==5.5.4", "tokenizers==0.22.2",
        "huggingface-hub==1.33.0", "openvino-tokenizers==2026.4.1.0", "httpx", "httpcore",
    ),
}  # fmt: skip
TEXTS = ["a short text", "한국어 문장입니다.", "one that is somewhat longer, " * 8 + "and ends"]
PROGRAM = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, backend, out, *texts = sys.argv[1:]
np.save(out, SentenceTransformer(folder, backend=backend, device="cpu").encode(texts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", VERSIONS)
def test_a_graph_runs_in_stock_sentence_transformers(kind, tmp_path):
    """Needs the package index."""
    export_model("nano", kind, tmp_path / "graph")
    venv.create(tmp_path / "own", with_pip=True)
    python = tmp_path / "own" / "bin" / "python"
    (own,) = (tmp_path / "own" / "lib").glob("python*/site-packages")
    (own / "those_here.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", *VERSIONS[kind]]
    subprocess.run(install, check=True, capture_output=True, text=True)
    asked = [tmp_path / "graph", kind, tmp_path / "vectors.npy", *TEXTS]
    ran = subprocess.run([python, "-c", PROGRAM, *asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ours = LLM2Vec.from_pretrained("nano", dtype="float32", device="cpu").encode(TEXTS)
    found = np.load(tmp_path / "vectors.npy")
    cosines = (found * ours).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosines.min() > 0.9999
    shown = (tmp_path / "graph" / "README.md").read_text()
    assert f'SentenceTransformer("sentence_transformers_model_id", backend="{kind}")' in shown
