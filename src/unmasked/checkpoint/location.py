"""Where a checkpoint is: a folder here, or a repository on the hub, and single files of it.

Cost: for a repository, a request for each file that is not in the hub's cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from unmasked.errors import ModelError, first_line

BUNDLED = "nano"
"""The name of the decoder that comes with the package."""
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
            raise ModelError(f"{self.name}/{filename} is not a JSON object.")
        return content or {}

    def read_list(self, filename: str) -> list[dict[str, Any]]:
        """The JSON list of objects in one file; empty if the file does not exist.

        Raises:
            ModelError: the file is not that.
        """
        content = self._read(filename)
        if content is not None and not isinstance(content, list):
            raise ModelError(f"{self.name}/{filename} is not a JSON list.")
        if not all(isinstance(item, dict) for item in content or []):
            raise ModelError(f"{self.name}/{filename} is not a list of JSON objects.")
        return content or []

    def _read(self, filename: str) -> Any:
        path = self.fetch(filename)
        if path is None:
            return None
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"{self.name}/{filename} is not JSON: {error}. Fix: download or save it again."
            ) from error

    def has_tokenizer(self) -> bool:
        """Whether the files of a tokenizer are there."""
        return any(map(self.fetch, ("tokenizer.json", "tokenizer.model", "vocab.json")))

    def unreadable(self, error: Exception) -> ModelError:
        """What is raised where this location cannot be loaded because of `error`."""
        first = first_line(error)
        if Path(self.name).exists():
            return ModelError(f"cannot load {self.name}: {first}")
        return ModelError(
            f"cannot load {self.name}: it is not a folder here, and the hub answered: {first} "
            f"Fix: check the name, or download the model and give its folder; '{BUNDLED}' is the "
            "model that comes with the package."
        )


def bundled_path() -> Path:
    """Folder of the bundled decoder."""
    return Path(str(files("unmasked"))) / BUNDLED


def locate(name: str | Path, **hub: Any) -> Location:
    """The location of a name; ``nano`` is the bundled decoder, ``./nano`` a folder."""
    given = str(bundled_path()) if str(name) == BUNDLED else str(name).rstrip("/") or "/"
    return Location(given, hub)


def locate_adapter(name: str | Path, **hub: Any) -> Location:
    """The same for an adapter beside a base: its revision is written ``OWNER/NAME@REVISION``."""
    rest = {key: value for key, value in hub.items() if key != "revision"}
    bare_name, _, revision = str(name).partition("@")
    if revision and not Path(name).exists():
        return Location(bare_name, {**rest, "revision": revision})
    return locate(name, **rest)
