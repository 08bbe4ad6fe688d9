"""Where a checkpoint is: a folder here, or a repository on the hub, and single files of it.

Cost: for a repository, a request to see whether it can be reached, and one for each file that is
not in the hub's cache.
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
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from unmasked.errors import ModelError, first_line, nearest

BUNDLED = "nano"
"""The name of the decoder that comes with the package."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PASTED = re.compile(r"(?:hf:|https?://(?:huggingface|hf)\.co/)([\w.-]+/[\w.-]+)(?:/.*)?")
"""A name of the hub with what stands before it in an address, or for a data set."""
PARTS_OF_A_MODEL = ("config.json", "adapter_config.json")
"""Files of which a model has one."""
_AGAIN = "Fix: download or save it again."
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


@dataclass(frozen=True)
class Location:
    """A folder or hub repository, and how the hub is asked for it.

    Attributes:
        name: path of the folder, or ``OWNER/NAME``.
        hub: options of the hub by name, see `HUB_OPTIONS`.
    """

    name: str
    hub: dict[str, Any] = field(default_factory=dict)

    def fetch(self, filename: str) -> str | None:
        """Path of one file; None if the folder or repository does not have it."""
        if Path(self.name).is_dir():
            path = Path(self.name) / filename
            return str(path) if path.is_file() else None
        if Path(self.name).is_absolute() or self.name.count("/") != 1:
            return None
        try:
            return str(hf_hub_download(self.name, filename, **self.hub))
        except (EntryNotFoundError, OSError):
            return None

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
            ModelError: the file is not that.
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
        """Whether the files of a tokenizer are there."""
        return any(map(self.fetch, ("tokenizer.json", "tokenizer.model", "vocab.json")))

    def require(self) -> Location:
        """Itself, if it is here, in the hub's cache, or the hub can be reached.

        The libraries below ask an unreachable hub for half a minute, for each file; this asks once.

        Raises:
            ModelError: it is none of these; the message names the nearest folder.
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
        cached = {key: self.hub[key] for key in ("cache_dir", "revision") if self.hub.get(key)}
        if any(try_to_load_from_cache(self.name, part, **cached) for part in PARTS_OF_A_MODEL):
            return self
        url = hf_hub_url(self.name, PARTS_OF_A_MODEL[0], revision=self.hub.get("revision"))
        try:
            get_hf_file_metadata(url, token=self.hub.get("token"))
        except HfHubHTTPError:
            pass  # the hub has answered; what it lacks is told where it is asked for
        except Exception as error:  # the layers below have errors of their own
            raise self.unreadable(error) from error
        return self

    def unreadable(self, error: Exception) -> ModelError:
        """What is raised where this location cannot be loaded because of `error`."""
        first = first_line(error)
        if Path(self.name).exists():
            return ModelError(f"cannot load {self.name}: {first} Fix: save or download it again.")
        return ModelError(
            f"cannot load {self.name}: it is not a folder here{self.hint()} The hub answered: "
            f"{first.rstrip('.')}. Fix: check the name and the network, or download the model "
            "where there is one and name its folder (in a recipe, model.base=FOLDER); "
            f"'{BUNDLED}' is the model that comes with the package."
        )

    def hint(self) -> str:
        """``, did you mean './encoder'?`` for a folder of a model whose name is much like this."""
        given = Path(self.name)
        beside = given.parent.iterdir() if given.parent.is_dir() else ()
        models = [_shown(path) for path in beside if path.is_dir() and _inside(path) is not None]
        near = nearest(str(given), [BUNDLED])  # first: a slip of the most used name
        return near if near != "." else nearest(_shown(given), models)


def _shown(path: Path) -> str:
    """A path that cannot be taken for a name of the hub."""
    return str(path) if path.is_absolute() else f"./{path}"


def _inside(folder: Path) -> Path | None:
    """The folder itself if it holds a model; or, for a run folder, the model that was made."""
    for path in (folder, folder / "model"):
        if any((path / part).is_file() for part in PARTS_OF_A_MODEL):
            return path
    return None


def bundled_path() -> Path:
    """Folder of the bundled decoder."""
    return Path(str(files("unmasked"))) / BUNDLED


def locate(name: str | Path, **hub: Any) -> Location:
    """The location of a name; ``nano`` is the bundled decoder, ``./nano`` a folder.

    A `Path` that is there is a folder, whatever it is called: it cannot say ``./``. A run
    folder stands for the encoder that was made in it.

    Raises:
        ModelError: there is no name.
    """
    if not str(name).strip():
        raise ModelError(
            f"the name of a model is {str(name)!r}, as of a variable that is not set. "
            f"Fix: a folder, a hub name, or {BUNDLED}."
        )
    if str(name) == BUNDLED and not (isinstance(name, Path) and name.is_dir()):
        return Location(str(bundled_path()), hub)
    given = str(name).rstrip("/") or "/"
    inside = _inside(Path(given)) if Path(given).is_dir() else None
    return Location(given if inside in (None, Path(given)) else str(inside), hub)


def locate_adapter(name: str | Path, **hub: Any) -> Location:
    """The same for an adapter beside a base: its revision is written ``OWNER/NAME@REVISION``."""
    rest = {key: value for key, value in hub.items() if key != "revision"}
    bare_name, _, revision = str(name).partition("@")
    if revision and not Path(name).exists():
        return Location(bare_name, {**rest, "revision": revision})
    return locate(name, **rest)
