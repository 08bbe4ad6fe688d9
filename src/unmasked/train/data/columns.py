"""Which column of a training file is what: one table of the names that are in use.

Files come from sentence-transformers, FlagEmbedding, GritLM, Tevatron, MS MARCO, echo-embeddings
and from people's own hands, and each calls its columns otherwise. A column with a name of `NAMES`
is found without being asked for; where two could be the same thing the file is refused, and every
column that is not used is named, since a negative that is left out costs a training run.

Cost: once per file, or per set of keys in .jsonl.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unmasked.errors import DataError, nearest
from unmasked.recipe.schema import Pairs

NAMES = {
    "query": ("query", "query_text", "anchor", "question", "sentence1", "premise", "sent0"),
    "positive": ("positive", "positives", "pos", "positive_passages", "positive_ctxs", "answer",
                 "document", "passage", "response", "sentence2", "hypothesis", "sent1"),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives", "hard_neg",
                 "negative_passages", "hard_negative_ctxs", "negative_ctxs"),
    "instruction": ("prompt", "instruction"),
}  # fmt: skip
"""What each column may be called, in capitals or not, with spaces and `_` or without. All columns
of negatives are used, of the others one."""
ONE_TEXT = {"positive", "negative", "hard_negative", "answer", "document", "passage", "response",
            "sentence2", "hypothesis", "sent1"}  # fmt: skip
"""Columns of one text by their name, and ``negative_1`` to ``negative_n``."""
_NUMBERED = re.compile(r"(?:hard)?neg(?:ative)?s?(\d+)")
"""``negative_1`` to ``negative_n``, as sentence-transformers mines them."""
_JUDGED = ("sentence2", "hypothesis", "answer", "document", "passage", "response")
_SCORES = ("score", "similarity_score")
TAUGHT = {
    "scores": (("scores",), ("score",), ("similarity_score",), ("pos_scores", "neg_scores")),
    "vectors": (("vectors",),),
}
"""What the columns of a teacher may be called; of FlagEmbedding's two, both are needed."""
_LABELS = ("label", "labels", "gold_label")
_IDS = re.compile(r".*ids?", re.IGNORECASE)
"""Columns that are never suggested for a text."""


def holds_several(column: str) -> bool | None:
    """Whether the name of a column says that it holds several texts, or one; None for others."""
    if with_name(ONE_TEXT, [column]) or _NUMBERED.fullmatch(_folded(column)):
        return False
    return True if with_name((*NAMES["positive"], *NAMES["negative"]), [column]) else None


@dataclass(frozen=True)
class Columns:
    """The columns of a file, or of a row, by what they are.

    Attributes:
        query, positive: one column each.
        negatives: any number, in the order in which they are used.
        instruction: of what stands before the query, if a column has it.
        label: of what says whether the pair matches, if a column does.
        taught: of what a teacher says, where that is read.
        unused: all others.
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    instruction: str | None
    label: str | None
    unused: tuple[str, ...]
    taught: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        """Every column that is read."""
        others = filter(None, (self.instruction, self.label))
        return [self.query, self.positive, *self.negatives, *others, *self.taught]


def find_columns(
    pairs: Pairs, there: Sequence[str], where: str, wants: str | None = None
) -> Columns:
    """What the columns of a file are: as the data set says, else by their names.

    Args:
        pairs: the data set; a column that it names has to exist.
        there: the columns of the file, or the keys of a row.
        where: the file and line, for errors.
        wants: ``scores`` or ``vectors`` if a teacher's are read from the rows.

    Raises:
        DataError: a column is missing, or two could be the same thing.
    """
    named = {"query": pairs.query, "positive": pairs.positive}
    taken = {*filter(None, named.values()), *pairs.negative}
    roles: dict[str, str | None] = {}
    for role in ("query", "positive", "instruction"):
        if role == "instruction" and pairs.instruction:
            continue  # the recipe says what stands before its queries
        given = named.get(role)
        if given is not None:
            if given not in there:
                near = _near(given, there)
                raise _error(where, _missing(given, there), _command(pairs, **{role: near}))
            roles[role] = given
            continue
        found = [name for name in with_name(NAMES[role], there) if name not in taken]
        if len(found) > 1:
            said = f"'{found[0]}' and '{found[1]}' could both be the {role}"
            raise _error(where, said, _command(pairs, **{role: found[0]}))
        if not found and role != "instruction":
            free = [name for name in there if name not in {*taken, *roles.values()}]
            near = _near(NAMES[role], free)
            if role == "query" and not (pairs.positive or with_name(NAMES["positive"], there)):
                answer = _near(NAMES["positive"], [name for name in free if name != near])
                said = f"no columns 'query' and 'positive' among {', '.join(there) or 'none'}"
                raise _error(where, said, _command(pairs, query=near, positive=answer))
            hint = "" if near == "NAME" else f", did you mean '{near}'"
            said = f"no column '{role}' among {', '.join(there) or 'none'}{hint}"
            raise _error(where, said, _command(pairs, **{role: near}))
        roles[role] = found[0] if found else None
    query, positive = str(roles["query"]), str(roles["positive"])
    if query == positive:
        raise _error(where, f"'{query}' is named as query and as positive", "name two columns")
    instruction = roles.get("instruction")
    taught = _taught(pairs, wants, there, where) if wants else ()
    label = _label(pairs, query, positive, there, where, taught)
    negatives = tuple(n for n in pairs.negative or _negatives(there) if n in there)
    used = {query, positive, *negatives, instruction, label, *taught}
    unused = tuple(name for name in there if name not in used)
    return Columns(query, positive, negatives, instruction, label, unused, taught)


def _taught(pairs: Pairs, wants: str, there: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns of what a teacher says."""
    if pairs.teacher is not None:
        if pairs.teacher not in there:
            near = _near(pairs.teacher, there)
            said = _missing(pairs.teacher, there)
            raise _error(where, said, _command(pairs, teacher=near))
        return (pairs.teacher,)
    found = [names for names in TAUGHT[wants] if all(name in there for name in names)]
    if not found:
        said = f"no column '{wants}', which supervised.teacher reads, among {', '.join(there)}"
        fix = f"{_command(pairs, teacher='NAME')}, or supervised.teacher=MODEL to compute them"
        raise _error(where, said, fix)
    if len(found) > 1:
        said = f"'{found[0][0]}' and '{found[1][0]}' could both be the teacher's {wants}"
        raise _error(where, said, _command(pairs, teacher=found[0][0]))
    return found[0]


def _negatives(there: Iterable[str]) -> list[str]:
    """Columns of negatives: those without a number first, the others by their numbers."""
    there = list(there)
    plain = with_name(NAMES["negative"], there)
    numbered = [(int(m[1]), name) for name in there if (m := _NUMBERED.fullmatch(_folded(name)))]
    return [*plain, *(name for _, name in sorted(numbered))]


def _label(
    pairs: Pairs,
    query: str,
    positive: str,
    there: Sequence[str],
    where: str,
    taught: tuple[str, ...],
) -> str | None:
    """The column that says which pairs match, unless someone named the columns of both texts.

    A score is refused, unless a teacher is asked for that reads it: from which one on a pair
    matches is not for this stage to say.
    """
    judged = with_name(_JUDGED, [positive])
    if not judged or (pairs.query and pairs.positive):
        return None
    if taught:
        if label := next((name for name in with_name(_LABELS, there) if name not in taught), None):
            word = _word(pairs, query=query, positive=positive)
            said = f"'{label}' says which pairs match, and '{taught[0]}' how much"
            raise _error(where, said, f"give {word}, which takes no notice of '{label}'")
        return None
    if score := next(iter(with_name(_SCORES, there)), None):
        word = _word(pairs, query=query, positive=positive)
        given = f"'{score}' says how much '{query}' and '{positive}' match, and this stage takes "
        fix = "learn the scores (supervised.teacher.loss=cosent supervised.teacher.contrastive=0), "
        fix += f"or keep the rows that match, and name their columns: {word}"
        raise _error(where, given + "every row as a match", fix)
    return next(iter(with_name(_LABELS, there)), None)


def check_found(pairs: Pairs, seen: Iterable[str]) -> None:
    """Refuse a column of negatives that was asked for and that no row has."""
    seen = list(dict.fromkeys(seen))
    for name in pairs.negative:
        if name not in seen:
            said = f"no row has a column '{name}', among {', '.join(seen)}"
            near = _near(name, seen, next(iter(_negatives(seen)), "NAME"))
            others = [near if given == name else given for given in pairs.negative]
            fix = _command(pairs, negative=others)
            raise _error(pairs.path, said + nearest(name, seen, end=""), fix)


def told(pairs: Pairs, found: Iterable[Columns]) -> str:
    """The line that says what was recognised in a data set, and what was not used."""
    parts: dict[str, dict[str, None]] = {}
    for columns in found:
        for role, names in (
            ("query", [columns.query]),
            ("positive", [columns.positive]),
            ("negatives", columns.negatives),
            ("instruction", [columns.instruction] if columns.instruction else []),
            ("label", [columns.label] if columns.label else []),
            ("teacher", columns.taught),
            ("not used", columns.unused),
        ):
            parts.setdefault(role, {}).update(dict.fromkeys(names))
    used = {name for role, names in parts.items() if role != "not used" for name in names}
    for name in used:
        parts["not used"].pop(name, None)
    said = [f"{role}: {', '.join(names) or 'none'}" for role, names in parts.items()]
    optional = ("instruction: none", "label: none", "teacher: none", "not used: none")
    said = [text for text in said if text not in optional]
    return f"{pairs.path}: {'; '.join(said)}"


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def with_name(names: Iterable[str], there: Sequence[str]) -> list[str]:
    """The columns that have one of these names, in the order of the names."""
    return [column for name in names for column in there if _folded(column) == _folded(name)]


def _missing(name: str, there: Sequence[str]) -> str:
    texts = [column for column in there if not _IDS.fullmatch(column)]
    hint = nearest(name, texts, end="").rstrip("?")
    return f"no column '{name}' among {', '.join(there) or 'none'}{hint}"


def _near(name: str | Sequence[str], there: Iterable[str], otherwise: str = "NAME") -> str:
    """The most similar column that may hold texts."""
    hint = nearest(name, [column for column in there if not _IDS.fullmatch(column)], end="")
    return hint.split("'")[1] if hint else otherwise


def _command(pairs: Pairs, **columns: str | list[str]) -> str:
    return f"give {_word(pairs, **columns)} in place of {_word(pairs)}"


def _word(pairs: Pairs, **columns: str | list[str]) -> str:
    """The data set as it is given to a command, with other columns than it has."""
    roles = {"query", "positive", "negative", "teacher"}
    given = pairs.model_dump(include=roles, exclude_defaults=True) | columns
    several = {role: [n] if isinstance(n, str) else n for role, n in given.items()}
    parts = [f"{role}={name}" for role, names in several.items() for name in names]
    return shlex.quote(":".join(filter(None, (pairs.path, ",".join(parts)))))


def _error(where: str, given: str, fix: str) -> DataError:
    stop = "" if given.endswith(("?", ".")) else "."
    return DataError(f"{where}: {given}{stop} Fix: {fix}.")
