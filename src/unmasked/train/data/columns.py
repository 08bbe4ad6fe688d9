"""Finds the columns of a training file by their names, with one table of the names in use.

Files come from sentence-transformers, FlagEmbedding, GritLM, Tevatron, MS MARCO, echo-embeddings
and users' own scripts, and their columns have different names. A column with a name of `NAMES` is
found automatically. If two columns could have the same role, the file is refused. A log line names
every column that is not used, because a negative that is silently left out costs a training run.

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
"""The names of each role's columns; case, spaces and `_` do not matter. All columns of negatives
are used, and one column of each other role."""
ONE_TEXT = {"positive", "negative", "hard_negative", "answer", "document", "passage", "response",
            "sentence2", "hypothesis", "sent1"}  # fmt: skip
"""Names that say that the column has one text per row, as ``negative_1`` to ``negative_n`` do."""
_NUMBERED = re.compile(r"(?:hard)?neg(?:ative)?s?(\d+)")
"""``negative_1`` to ``negative_n``, as sentence-transformers mines them."""
_JUDGED = ("sentence2", "hypothesis", "answer", "document", "passage", "response")
"""Positives that may not match their query: only beside them is a label or a score looked for."""
_SCORES = ("score", "similarity_score")
TAUGHT = {
    "scores": (("scores",), ("score",), ("similarity_score",), ("pos_scores", "neg_scores")),
    "vectors": (("vectors",),),
}
"""The names of a teacher's columns; FlagEmbedding's ``pos_scores`` and ``neg_scores`` belong
together."""
ANY = "any"
"""Asks for a teacher's scores or vectors if the file has them, to keep them with the rows."""
_LABELS = ("label", "labels", "gold_label")
_IDS = re.compile(r".*ids?", re.IGNORECASE)
"""Columns that are never suggested for a text."""


def holds_several(column: str) -> bool | None:
    """Whether a column has several texts per row, judged by its name; None if that is not known."""
    if with_name(ONE_TEXT, [column]) or _NUMBERED.fullmatch(_folded(column)):
        return False
    return True if with_name((*NAMES["positive"], *NAMES["negative"]), [column]) else None


@dataclass(frozen=True)
class Columns:
    """The columns of a file, or of a row, by their roles.

    Attributes:
        query, positive: one column each.
        negatives: any number of columns, in the order in which they are used.
        instruction: the column of the query's instruction, if there is one.
        label: the column that says whether the pair matches, if there is one.
        taught: columns of a teacher's scores or vectors, if these are read.
        unused: all other columns.
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
    """The columns of a file by their roles: as the data set names them, else by their names.

    Args:
        pairs: the data set; a column that it names must exist.
        there: the columns of the file, or the keys of a row.
        where: the file and line, for errors.
        wants: ``scores`` or ``vectors`` if the rows must have a teacher's; `ANY` if they may have
            some. Then labels are read, and pairs that match to a degree refused, as without a
            teacher, unless the data set names its column.

    Raises:
        DataError: a column is missing, or two could have the same role.
    """
    named = {"query": pairs.query, "positive": pairs.positive}
    taken = {*filter(None, named.values()), *pairs.negative}
    roles: dict[str, str | None] = {}
    for role in ("query", "positive", "instruction"):
        if role == "instruction" and pairs.instruction:
            continue  # the recipe's instruction takes precedence over a column
        given = named.get(role)
        if given is not None:
            if given not in there:
                near = _near(given, there)
                raise _error(where, _missing(given, there), _instead(pairs, **{role: near}))
            roles[role] = given
            continue
        found = [name for name in with_name(NAMES[role], there) if name not in taken]
        if len(found) > 1:
            said = f"'{found[0]}' and '{found[1]}' could both be the {role}"
            raise _error(where, said, _instead(pairs, **{role: found[0]}))
        if not found and role != "instruction":
            free = [name for name in there if name not in {*taken, *roles.values()}]
            near = _near(NAMES[role], free)
            if role == "query" and not (pairs.positive or with_name(NAMES["positive"], there)):
                answer = _near(NAMES["positive"], [name for name in free if name != near])
                said = f"no columns 'query' and 'positive' among {', '.join(there) or 'none'}"
                raise _error(where, said, _instead(pairs, query=near, positive=answer))
            hint = "" if near == "NAME" else f", did you mean '{near}'"
            said = f"no column '{role}' among {', '.join(there) or 'none'}{hint}"
            raise _error(where, said, _instead(pairs, **{role: near}))
        roles[role] = found[0] if found else None
    query, positive = str(roles["query"]), str(roles["positive"])
    if query == positive:
        raise _error(where, f"'{query}' is named as query and as positive", "name two columns")
    instruction = roles.get("instruction")
    taught = _taught(pairs, wants, there, where) if wants else ()
    certain = taught if wants != ANY or pairs.teacher else ()
    label = _label(pairs, query, positive, there, where, certain)
    taught = () if label is not None else taught  # only with `ANY`: else both are refused
    negatives = tuple(n for n in pairs.negative or _negatives(there) if n in there)
    used = {query, positive, *negatives, instruction, label, *taught}
    unused = tuple(name for name in there if name not in used)
    return Columns(query, positive, negatives, instruction, label, unused, taught)


def _taught(pairs: Pairs, wants: str, there: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns of a teacher's scores or vectors."""
    if pairs.teacher is not None:
        if pairs.teacher not in there:
            near = _near(pairs.teacher, there)
            said = _missing(pairs.teacher, there)
            raise _error(where, said, _instead(pairs, teacher=near))
        return (pairs.teacher,)
    known = dict.fromkeys(names for w in TAUGHT if wants in (w, ANY) for names in TAUGHT[w])
    found = [names for names in known if all(name in there for name in names)]
    if wants == ANY:
        return found[0] if len(found) == 1 else ()
    if not found:
        said = f"no column '{wants}', which supervised.teacher reads, among {', '.join(there)}"
        fix = f"{_instead(pairs, teacher='NAME')}, or supervised.teacher=MODEL to compute them"
        raise _error(where, said, fix)
    if len(found) > 1:
        said = f"'{found[0][0]}' and '{found[1][0]}' could both be the teacher's {wants}"
        raise _error(where, said, _instead(pairs, teacher=found[0][0]))
    return found[0]


def _negatives(there: Iterable[str]) -> list[str]:
    """Columns of negatives: first those without a number, then the others by their numbers."""
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
    """The column that says which pairs match, unless the user has named both columns of texts.

    A column of scores is refused, unless it is read as a teacher's: this stage cannot know from
    which score on a pair matches.
    """
    judged = with_name(_JUDGED, [positive])
    if not judged or (pairs.query and pairs.positive):
        return None
    if taught:
        if label := next((name for name in with_name(_LABELS, there) if name not in taught), None):
            argument = _argument(pairs, query=query, positive=positive)
            said = f"'{label}' says which pairs match, and '{taught[0]}' how much"
            raise _error(where, said, f"give {argument}, which ignores '{label}'")
        return None
    if score := next(iter(with_name(_SCORES, there)), None):
        argument = _argument(pairs, query=query, positive=positive)
        given = f"'{score}' says how much '{query}' and '{positive}' match, and this stage takes "
        fix = "learn the scores (supervised.teacher.loss=cosent supervised.teacher.contrastive=0), "
        fix += f"or keep the rows that match, and name their columns: {argument}"
        raise _error(where, given + "every row as a match", fix)
    return next(iter(with_name(_LABELS, there)), None)


def check_found(pairs: Pairs, seen: Iterable[str]) -> None:
    """Refuse a data set that names a column of negatives which no row has."""
    seen = list(dict.fromkeys(seen))
    for name in pairs.negative:
        if name not in seen:
            said = f"no row has a column '{name}', among {', '.join(seen)}"
            near = _near(name, seen, next(iter(_negatives(seen)), "NAME"))
            others = [near if given == name else given for given in pairs.negative]
            fix = _instead(pairs, negative=others)
            raise _error(pairs.path, said + nearest(name, seen, end=""), fix)


def told(pairs: Pairs, found: Iterable[Columns]) -> str:
    """A line that says which columns of a data set were recognised, and which are not used."""
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
    """The columns with one of these names, in the order of the names."""
    return [column for name in names for column in there if _folded(column) == _folded(name)]


def _missing(name: str, there: Sequence[str]) -> str:
    texts = [column for column in there if not _IDS.fullmatch(column)]
    hint = nearest(name, texts, end="").rstrip("?")
    return f"no column '{name}' among {', '.join(there) or 'none'}{hint}"


def _near(name: str | Sequence[str], there: Iterable[str], otherwise: str = "NAME") -> str:
    """The column with the most similar name that may have texts."""
    hint = nearest(name, [column for column in there if not _IDS.fullmatch(column)], end="")
    return hint.split("'")[1] if hint else otherwise


def _instead(pairs: Pairs, **columns: str | list[str]) -> str:
    """The fix that names other columns."""
    return f"give {_argument(pairs, **columns)} in place of {_argument(pairs)}"


def argument_of(pairs: Pairs, **columns: str | list[str]) -> str:
    """The data set as an argument of a command, with all that decides which texts it has.

    Args:
        pairs: the data set.
        columns: role → column, in place of those that it names.
    """
    parts = {"subset", "split", "query", "positive", "negative", "teacher", "max_rows"}
    given = pairs.model_dump(include=parts, exclude_defaults=True) | columns
    several = {role: n if isinstance(n, list) else [n] for role, n in given.items()}
    settings = [f"{role}={name}" for role, names in several.items() for name in names]
    return ":".join(filter(None, (pairs.path, ",".join(settings))))


def _argument(pairs: Pairs, **columns: str | list[str]) -> str:
    return shlex.quote(argument_of(pairs, **columns))


def _error(where: str, given: str, fix: str) -> DataError:
    stop = "" if given.endswith(("?", ".")) else "."
    return DataError(f"{where}: {given}{stop} Fix: {fix}.")
