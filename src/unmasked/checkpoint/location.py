"""Where a checkpoint is: a local folder or a repository on the hub, and single files of it.

Cost: for a repository, one request to check whether it can be reached, and one for each file that
is not in the hub's cache.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unmasked.errors import ModelError, first_line, nearest

BUNDLED = "nano"
"""The name of the decoder that comes with the package."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PASTED = re.compile(r"(?:hf:|https?://(?:huggingface|hf)\.co/)([\w.-]+/[\w.-]+)(?:/.*)?")
"""A hub name inside a pasted address, or with the ``hf:`` of a data set."""
PARTS_OF_A_MODEL = ("config.json", "adapter_config.json")
"""Every model folder has one of these files."""
_AGAIN = "Fix: download or save it again."
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


@dataclass(frozen=True)
class Location:
    """A folder or a hub repository.

    Attributes:
        name: path of the folder, or ``OWNER/NAME``.
        hub: options of requests to the hub, see `HUB_OPTIONS`.
    """

    name: str
    hub: dict[str, Any] = field(default_factory=dict)

    def fetch(self, filename: str) -> str | None:
        """Path of one file; None if the folder or repository does not have it.

        Without a network (``local_files_only``, ``HF_HUB_OFFLINE=1``), a repository is what is in
        the hub's cache. A file that the hub could not send may exist, and without it this would be
        another model, so that is an error.

        Raises:
            ModelError: the hub did not say whether there is such a file.
        """
        if Path(self.name).is_dir():
            path = Path(self.name) / filename
            return str(path) if path.is_file() else None
        if Path(self.name).is_absolute() or self.name.count("/") != 1:
            return None
        try:
            return str(hf_hub_download(self.name, filename, **self.hub))
        except Exception as error:  # each network layer has errors of its own
            if self._is_absent(filename, error):
                return None
            if _names_nothing(error):
                raise self.unreadable(error) from error
            raise ModelError(
                f"{self.name}/{filename} cannot be fetched: {_answer(error)}. Whether there is "
                "such a file is not known, and without it this may be another model. Fix: try "
                "again; if access was refused, log in with 'hf auth login' or set HF_TOKEN; with "
                "HF_HUB_OFFLINE=1, only what is in the hub's cache is loaded."
            ) from error

    def _is_absent(self, filename: str, error: Exception) -> bool:
        """Whether `error`, from fetching a file, means that the repository does not have it."""
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return True  # the hub has said so
        if isinstance(error, HFValidationError):
            return True  # no repository has such a name
        if self.hub.get("local_files_only") or is_offline_mode():
            return isinstance(error, LocalEntryNotFoundError)
        # The cache also keeps which files a repository lacks: neither None nor a path.
        return not isinstance(self._in_cache(filename), str | None)

    def _in_cache(self, filename: str) -> Any:
        known = {key: self.hub[key] for key in ("cache_dir", "revision") if self.hub.get(key)}
        return try_to_load_from_cache(self.name, filename, **known)

    def read_json(self, filename: str) -> dict[str, Any]:
        """The JSON object in one file; empty if the file does not exist.

        Raises:
            ModelError: the file is not a JSON object.
        """
        content = self._read(filename)
        if not isinstance(content, dict | None):
            raise ModelError(f"{self.name}/{filename} is not a JSON object. {_AGAIN}")
        return content or {}

    def read_list(self, filename: str) -> list[dict[str, Any]]:
        """The JSON list of objects in one file; empty if the file does not exist.

        Raises:
            ModelError: the file is not a list of JSON objects.
        """
        content = self._read(filename)
        if content is not None and not isinstance(content, list):
            raise ModelError(f"{self.name}/{filename} is not a JSON list. {_AGAIN}")
        if not all(isinstance(item, dict) for item in content or []):
            raise ModelError(f"{self.name}/{filename} is not a list of JSON objects. {_AGAIN}")
        return content or []

    def _read(self, filename: str) -> Any:
        path = self.fetch(filename)
        if path is None:
            return None
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{self.name}/{filename} is not JSON: {error}. {_AGAIN}") from error

    def has_tokenizer(self) -> bool:
        """Whether there are files of a tokenizer."""
        return any(map(self.fetch, ("tokenizer.json", "tokenizer.model", "vocab.json")))

    def require(self) -> Location:
        """Return this location if it exists, is in the hub's cache, or the hub can be reached.

        With ``local_files_only`` the hub is not asked; what is not there is reported later.

        The hub's own library retries an unreachable hub for half a minute per file; this method
        tries once.

        Raises:
            ModelError: none of these is true; the message names the most similar folder.
        """
        if Path(self.name).is_file():
            raise ModelError(
                f"{self.name} is a file. Fix: name the folder of a model (of an archive, what is "
                "unpacked from it)."
            )
        if Path(self.name).exists():
            return self
        if not _HUB_NAME.fullmatch(self.name):
            pasted, fix = _PASTED.fullmatch(self.name), "check the name"
            if pasted or self.name.startswith("~/"):
                fix = f"give {pasted[1] if pasted else Path(self.name).expanduser()}"
            raise ModelError(f"{self.name}: no such folder{self.hint()} Fix: {fix}.")
        try:
            if any(map(self._in_cache, PARTS_OF_A_MODEL)) or self.hub.get("local_files_only"):
                return self
            url = hf_hub_url(self.name, PARTS_OF_A_MODEL[0], revision=self.hub.get("revision"))
            get_hf_file_metadata(url, token=self.hub.get("token"))
        except HfHubHTTPError:
            pass  # the hub can be reached; a missing file is reported when it is fetched
        except Exception as error:  # each network layer has errors of its own
            raise self.unreadable(error) from error
        return self

    def unreadable(self, error: Exception) -> ModelError:
        """The error to raise if this location cannot be loaded because of `error`."""
        if Path(self.name).exists():
            first = first_line(error)
            fix = "save or download it again"
            if isinstance(error, ImportError):
                fix = "install what is missing, or leave out the option that needs it"
            return ModelError(f"cannot load {self.name}: {first} Fix: {fix}.")
        private = " (and log in with 'hf auth login', if it is private)"
        login = private if isinstance(error, RepositoryNotFoundError) else ""
        return ModelError(
            f"cannot load {self.name}: it is not a folder here{self.hint()} The hub answered: "
            f"{_answer(error)}. Fix: check the name and the network{login}, or download the model "
            "where there is one and name its folder (in a recipe, model.base=FOLDER); "
            f"'{BUNDLED}' is the model that comes with the package."
        )

    def hint(self) -> str:
        """``, did you mean './encoder'?`` if a model folder has a similar name, else ``.``."""
        given = Path(self.name)
        siblings = given.parent.iterdir() if given.parent.is_dir() else ()
        models = [_shown(path) for path in siblings if path.is_dir() and _model_in(path)]
        hint = nearest(str(given), [BUNDLED])  # first: a typing error in the most used name
        return hint if hint != "." else nearest(_shown(given), models)


def _names_nothing(error: Exception) -> bool:
    """Whether the hub has answered that it has no such repository or revision."""
    missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
    return missing and not isinstance(error, GatedRepoError)


def _answer(error: BaseException) -> str:
    """What the hub or the network answered, without a full stop at its end."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the error of the request, of which this one only says that it was
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The line with the id of a request has only the status; the next one says what was refused.
    said = [line for line in lines if "Request ID:" not in line] or lines or [type(error).__name__]
    return said[0].rstrip(".")


def _shown(path: Path) -> str:
    """A path in a form that cannot be mistaken for a hub name."""
    return str(path) if path.is_absolute() else f"./{path}"


def _model_in(folder: Path) -> Path | None:
    """The folder itself if it holds a model; for a run folder, the folder of its final model."""
    for path in (folder, folder / "model"):
        if any((path / part).is_file() for part in PARTS_OF_A_MODEL):
            return path
    return None


def bundled_path() -> Path:
    """The folder of the bundled decoder."""
    return Path(str(files("unmasked"))) / BUNDLED


def expanded(path: str | Path) -> Path:
    """The path with ``~/`` at its beginning replaced by the home folder, as shells do it."""
    return Path(path).expanduser() if str(path).startswith("~/") else Path(path)


def locate(name: str | Path, **hub: Any) -> Location:
    """The location of a name; ``nano`` is the bundled decoder, ``./nano`` a folder.

    A `Path` that exists is a folder, also one called ``nano``, because it cannot begin with ``./``.
    The name of a run folder stands for the encoder in it.

    Raises:
        ModelError: the name is empty, or the system allows no such path.
    """
    if not str(name).strip():
        raise ModelError(
            f"the name of a model is {str(name)!r} (perhaps from a variable that is not set). "
            f"Fix: give a folder, a hub name, or {BUNDLED}."
        )
    try:
        Path(name).exists()
    except OSError as error:  # such as a name that is too long for the system
        shown = f"{str(name)[:60]}..." if len(str(name)) > 60 else str(name)
        raise ModelError(
            f"'{shown}' ({len(str(name))} characters) cannot be the name of a model: "
            f"{error.strerror}. Fix: give a folder, a hub name, or {BUNDLED}."
        ) from error
    if str(name).startswith("~/") and expanded(name).is_dir() and not Path(name).exists():
        name = expanded(name)
    if str(name) == BUNDLED and not (isinstance(name, Path) and name.is_dir()):
        return Location(str(bundled_path()), hub)
    given = str(name).rstrip("/") or "/"
    model = _model_in(Path(given)) if Path(given).is_dir() else None
    # Without need the name is not changed: `Path` would turn "./folder" into "folder".
    return Location(given if model in (None, Path(given)) else str(model), hub)


def locate_adapter(name: str | Path, **hub: Any) -> Location:
    """The location of an adapter; ``OWNER/NAME@REVISION`` names a revision of its own."""
    options = {key: value for key, value in hub.items() if key != "revision"}
    bare_name, _, revision = str(name).partition("@")
    if revision and not Path(name).exists():
        return Location(bare_name, {**options, "revision": revision})
    return locate(name, **options)
