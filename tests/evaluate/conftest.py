from __future__ import annotations

from pathlib import Path

import pytest
from support.tasks import beir_folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three documents, one query; d2 answers well, d3 a little."""
    documents = {f"d{n}": f"doc {n}" for n in (1, 2, 3)}
    qrels = {"q1": {"d1": 0, "d2": 3, "d3": 1}}
    return beir_folder(tmp_path / "tiny", documents, {"q1": "query"}, qrels)
