"""A teacher's scores or vectors of a batch: those that the rows have, or vectors that it computes.

A teacher model encodes each text that training will see once, before training. Its vectors are kept
in the run folder, in parts that are written aside and renamed, so that an interrupted run continues
after the last part, and a resumed stage has exactly the same numbers.

Cost of a model: one forward of it per text, 4 bytes per number on the disk while the stage trains,
and about 150 bytes per text of memory.

Shapes: B rows, K negatives of each, R = (2 + K) B texts, N different texts, W numbers of a vector.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import Tensor

from unmasked.checkpoint.fingerprint import fingerprint
from unmasked.checkpoint.folder import MODULES_NAME, SETTINGS_NAME
from unmasked.checkpoint.location import locate
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError, ModelError, RecipeError, first_line
from unmasked.files.writing import write_text, written_aside
from unmasked.recipe.schema import Supervised
from unmasked.recipe.teaching import SCORES, Teacher
from unmasked.text.templates import PLAIN
from unmasked.train.checkpoints import last_checkpoint
from unmasked.train.data.mixing import Input, Taught, inputs_of
from unmasked.train.data.pairs import read_rows
from unmasked.train.data.record import digest_of, read_facts
from unmasked.train.data.texts import text_key

logger = logging.getLogger(__name__)

FACTS = "teacher.json"
PROJECTION = "projection.npz"
_CHUNK = 4096  # texts per part


def scores_of_rows(rows: Sequence[dict[str, Any]], inputs: Sequence[Input]) -> Tensor:
    """(B, 1 + K) scores; a row with fewer negatives has its positive's again, as in `inputs_of`."""
    count = len(inputs) // len(rows) - 1
    padded = [[*row["scores"], *row["scores"][:1] * count][:count] for row in rows]
    return torch.tensor(padded, dtype=torch.float32)


def vectors_of_rows(rows: Sequence[dict[str, Any]], inputs: Sequence[Input]) -> Tensor:
    """(R, W) vectors of queries, positives and each rank of negatives, in that order."""
    count = len(inputs) // len(rows)
    padded = [[*row["vectors"], *row["vectors"][1:2] * count][:count] for row in rows]
    return torch.tensor(padded, dtype=torch.float32).transpose(0, 1).flatten(0, 1)


class TeacherVectors:
    """Looks up the vectors of a teacher by text.

    Args:
        folder: the folder that `compute_vectors` wrote.
        width: length of the student's vectors.
        teacher: the settings.
    """

    def __init__(self, folder: Path, width: int, teacher: Teacher) -> None:
        names = sorted(folder.glob("vectors-*.npy"))
        self.parts = [np.load(name, mmap_mode="r") for name in names]
        keys = [np.load(folder / f"keys-{name.stem[8:]}.npy") for name in names]
        every = np.concatenate(keys)
        self.order = np.argsort(every)  # (N,) the position in the parts of each sorted key
        self.keys = every[self.order]
        self.projection = None
        if teacher.projection == "pca" and teacher.loss not in SCORES:
            source = digest_of([_facts(folder).get("model"), every.tobytes()])
            self.projection = projection(self.parts, width, folder / PROJECTION, source)

    def __call__(self, rows: Sequence[dict[str, Any]], inputs: Sequence[Input]) -> Tensor:
        """(R, W) vectors of the inputs of a batch."""
        wanted = np.array([_key(item) for item in inputs])
        places = self.order[np.searchsorted(self.keys, wanted)]
        vectors = np.stack([self.parts[p // _CHUNK][p % _CHUNK] for p in places.tolist()])
        return torch.from_numpy(vectors if self.projection is None else vectors @ self.projection)


def projection(
    parts: Iterable[np.ndarray], width: int, kept: Path, source: str
) -> np.ndarray | None:
    """(W, width) the principal directions of vectors; None if W is not larger than `width`.

    Of all linear maps to `width` numbers this one changes the inner products least (Eckart and
    Young, 1936), so the vectors are not centred. It is written to the file `kept` with `source`, a
    digest of the vectors, so that a run that continues on another machine has the same directions,
    and one on other vectors has its own.
    """
    if kept.is_file():
        with np.load(kept) as found:
            if str(found["source"]) == source and found["directions"].shape[1] == width:
                return np.asarray(found["directions"])
    moments: Any = 0.0  # (W, W)
    for part in parts:
        wide = np.asarray(part, dtype=np.float64)
        moments = moments + wide.T @ wide
    if len(moments) <= width:
        return None
    _, directions = np.linalg.eigh(moments)
    chosen = np.ascontiguousarray(directions[:, ::-1][:, :width], dtype=np.float32)
    with written_aside(kept) as file:
        np.savez(file, directions=chosen, source=source)
    return chosen


def compute_vectors(
    stage: Supervised, folder: Path, width: int, tell: Callable[[str], object]
) -> None:
    """Compute the vectors of the stage's teacher, or continue an interrupted computation.

    Args:
        stage: its ``teacher.model`` is the teacher.
        folder: where the vectors are written.
        width: length of the student's vectors.
        tell: called with a line of progress.

    Raises:
        ModelError: the teacher cannot be loaded.
        RecipeError: its vectors have another width, and no projection is set.
        DataError: the teacher gave a vector that is not finite, or has changed since the last
            checkpoint of the stage.
    """
    assert stage.teacher is not None
    name, part = str(stage.teacher.model), -1
    model: Any = None  # loaded only if a part is missing
    for part, inputs in enumerate(_chunks(_different_inputs(stage))):
        keys = np.array([_key(item) for item in inputs])
        files = [folder / f"{kind}-{part:06d}.npy" for kind in ("keys", "vectors")]
        if model is None and not _is_written(files, keys, folder, name):
            model = _load_teacher(name, stage.teacher, width)
            if _claim(folder, name, model) and part:
                # The parts before this one had the right name, but came from other weights.
                return compute_vectors(stage, folder, width, tell)
        if _is_written(files, keys, folder, name):
            continue
        vectors = _encode(model, inputs)
        if not np.isfinite(vectors).all():
            raise DataError(
                f"the teacher {name} gives vectors that hold NaN or infinity. Fix: another teacher."
            )
        for file, array in zip(files, (keys, vectors), strict=True):
            with written_aside(file) as out:
                np.save(out, array)
        tell(f"teacher: {part * _CHUNK + len(inputs):,} texts")
    for file in folder.glob("*-*.npy"):  # left from data that had more texts
        if int(file.stem.split("-")[1]) > part:
            file.unlink()


def check_widths(stage: Supervised, rows: Iterable[Any], width: int) -> None:
    """Refuse vectors in the rows that cannot be compared with the student's.

    Raises:
        RecipeError: they have another width than the student's, and no projection is set.
        DataError: they do not all have the same width.
    """
    widths = {len(row.vectors[0]) for row in rows if row.vectors}
    if len(widths) > 1:
        said = ", ".join(map(str, sorted(widths)))
        fix = "Fix: give vectors of one model."
        raise DataError(f"supervised.data has vectors of {said} numbers. {fix}")
    for found in widths:
        _require_width("the vectors of the rows", found, width, stage.teacher)


def _require_width(whose: str, found: int, width: int, teacher: Teacher | None) -> None:
    if found != width and teacher and teacher.projection == "none" and teacher.loss not in SCORES:
        fix = "supervised.teacher.projection=pca"
        if teacher.model:
            fix += ", or supervised.teacher.loss=kl, which compares cosines"
        raise RecipeError(
            f"supervised.teacher: {whose} have {found} numbers, and the student's {width}. "
            f"Fix: {fix}."
        )


def taught(stage: Supervised, rows: Any, folder: Path, width: int) -> Taught | None:
    """The function that gives a teacher's scores or vectors of a batch; None without a teacher.

    Args:
        stage: the settings of the stage.
        rows: the stored rows.
        folder: the folder of a model's vectors, and of the projection.
        width: length of the student's vectors.
    """
    teacher = stage.teacher
    if teacher is None:
        return None
    if teacher.model is not None:
        return TeacherVectors(folder, width, teacher)
    if teacher.wants == "scores":
        return scores_of_rows
    if teacher.projection == "none":
        return vectors_of_rows
    batches = (np.concatenate(rows[i : i + 256]["vectors"]) for i in range(0, len(rows), 256))
    chosen = projection(batches, width, folder / PROJECTION, _digest_of_vectors(rows))
    narrow = None if chosen is None else torch.from_numpy(chosen)

    def projected(batch: Sequence[dict[str, Any]], inputs: Sequence[Input]) -> Tensor:
        vectors = vectors_of_rows(batch, inputs)
        return vectors if narrow is None else vectors @ narrow

    return projected


def _digest_of_vectors(rows: Any) -> str:
    """A digest of the vectors of stored rows, from their bytes; quick, as no list is made."""
    tables = rows.select_columns("vectors").with_format("arrow").iter(_CHUNK)
    lists = (table.column("vectors").combine_chunks().flatten() for table in tables)
    return digest_of(
        part for each in lists for part in (len(each), each.flatten().to_numpy().tobytes())
    )


def _different_inputs(stage: Supervised) -> Iterator[Input]:
    """Every text that training may see, once for each role and instruction that it has."""
    seen: set[int] = set()
    for number, pairs in enumerate(stage.data):
        for row in read_rows(pairs, number, teacher=stage.teacher):
            for item in inputs_of(stage.data, [row._asdict()], stage.hard_negatives):
                if (key := _key(item)) not in seen:
                    seen.add(key)
                    yield item


def _chunks(inputs: Iterator[Input]) -> Iterator[list[Input]]:
    while chunk := list(islice(inputs, _CHUNK)):
        yield chunk


def _key(item: Input) -> int:
    role = "query" if item.is_query else "document"
    written = "\x00".join((role, item.instruction, item.text))
    return int.from_bytes(text_key(written), "big", signed=True)


def _is_written(files: Sequence[Path], keys: np.ndarray, folder: Path, name: str) -> bool:
    """Whether a part exists, from this teacher and for exactly these texts."""
    facts = _facts(folder)
    same = (facts.get("name"), facts.get("files")) == (name, _files_of(name))
    written = same and all(file.is_file() for file in files)
    return written and np.array_equal(np.load(files[0]), keys)


def _claim(folder: Path, name: str, model: Any) -> bool:
    """Record which teacher writes the vectors.

    Returns:
        False if the folder belonged to this very teacher; else True, after everything in it was
        deleted.
    """
    if isinstance(model, LLM2Vec):
        digest = model.fingerprint()
    else:
        digest = fingerprint(
            model.state_dict(), model.tokenizer, [str(model), model.max_seq_length]
        )
    own = {"name": name, "model": digest, "prompts": model.prompts}
    before, stage = _facts(folder), folder.with_name("supervised")
    if read_facts(stage).get("teacher", own) != own and last_checkpoint(stage) is not None:
        raise DataError(
            f"the teacher {name} has changed since the last checkpoint of {stage.name} (its "
            "weights, settings or precision), and would give other vectors. Fix: put it back to "
            "continue, or choose another output folder."
        )
    is_other = any(before.get(key) != value for key, value in own.items())
    if is_other:
        shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / FACTS, json.dumps(own | {"files": _files_of(name)}) + "\n")
    return is_other


def _files_of(name: str) -> dict[str, list[int]]:
    """Size and time of each file of a teacher on this disk: they tell a change without loading."""
    stated = {str(p): p.stat() for p in sorted(Path(locate(name).name).rglob("*")) if p.is_file()}
    return {path: [found.st_size, found.st_mtime_ns] for path, found in stated.items()}


def teacher_of(folder: Path) -> dict[str, Any]:
    """Name, fingerprint and prompts of the teacher whose vectors are in a folder."""
    return {key: value for key, value in _facts(folder).items() if key != "files"}


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / FACTS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _load_teacher(name: str, teacher: Teacher, width: int) -> SentenceTransformer:
    """An encoder of this package, or one that sentence-transformers loads without remote code.

    Raises:
        ModelError: it is neither.
        RecipeError: see `compute_vectors`.
    """
    place, device = locate(name).require(), get_device_name()
    model: Any
    if place.fetch(MODULES_NAME) and not place.read_json(SETTINGS_NAME):
        try:
            model = SentenceTransformer(
                place.name, device=device, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"the teacher {name} cannot be loaded: {first_line(error)} "
                "Fix: a folder or hub name of an encoder with safetensors weights."
            ) from error
    else:
        model = LLM2Vec.from_pretrained(name, device=device)
    _require_width(f"vectors of {name}", int(model.get_embedding_dimension()), width, teacher)
    return model.eval()  # type: ignore[no-any-return]


def _encode(model: Any, inputs: Sequence[Input]) -> np.ndarray:
    """(n, W) float32 vectors; texts without an instruction get the teacher's own prompts."""
    groups: dict[tuple[bool, str], list[int]] = {}  # inputs that share a call: their positions
    for place, item in enumerate(inputs):
        groups.setdefault((item.is_query, item.instruction), []).append(place)
    vectors = np.empty((len(inputs), int(model.get_embedding_dimension())), dtype=np.float32)
    for (is_query, instruction), places in groups.items():
        own = {"prompt": PLAIN.join(instruction)} if instruction else {}
        run = model.encode_query if is_query else model.encode_document
        texts = [inputs[place].text for place in places]
        vectors[places] = run(texts, show_progress_bar=False, **own)
    return vectors
