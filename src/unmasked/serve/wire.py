"""What goes over the wire: the accepted bodies, the answers, and the errors.

The formats are those of OpenAI's embeddings and of Hugging Face's text-embeddings-inference (TEI),
with a few additional fields. An unknown field is an error that names the nearest known one, so that
nothing that a client asks for is silently ignored. A body is checked in one pass, in Rust, outside
the event loop. The first fault in a list ends its check, so that a hostile body cannot produce a
million errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from typing_extensions import TypeAliasType

from unmasked.errors import unknown

TokenId = Annotated[int, Field(strict=True, ge=0)]
Strings = TypeAliasType("Strings", Annotated[list[str], FailFast()])
TokenIds = TypeAliasType("TokenIds", Annotated[list[TokenId], FailFast()])
SeveralTokenIds = TypeAliasType("SeveralTokenIds", Annotated[list[TokenIds], FailFast()])
Texts = str | Strings | TokenIds | SeveralTokenIds
"""One text, several texts, the token ids of one text, or of several."""

KINDS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


class Refusal(Exception):
    """A request that is refused, with the error that the client gets.

    Args:
        message: what was given and what is allowed; never contains a part of a text.
        code: the kind of error, for programs.
        param: the field at fault.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fault = Fault(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorAnswer(error=fault).model_dump()


class Body(BaseModel):
    """The fields that every body may have."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    model: str | None = None
    """Name of the model; optional if only one is served."""
    prompt: str | None = None
    """Text put directly before every input."""
    prompt_name: str | None = None
    """Name of one of the model's prompts."""
    input_type: Literal["query", "document"] | None = None
    """Use the model's prompt for queries or for documents, if it has one."""
    truncate: bool | None = None
    """Cut off the end of a text that is too long; false makes it an error."""


class EmbeddingsBody(Body):
    """Body of ``/v1/embeddings``."""

    input: Texts
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] = "float"
    """Vectors as lists of numbers, or as base64 of little-endian float32 numbers."""
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Keep only this many numbers of every vector, the first ones."""
    normalize: bool = False
    """Scale every vector to length 1."""
    user: str | None = None
    """Accepted for compatibility with OpenAI; neither used nor logged."""


class EmbedBody(Body):
    """Body of ``/embed``."""

    inputs: Texts
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Keep only this many numbers of every vector, the first ones."""
    normalize: bool = True
    """Scale every vector to length 1, as TEI does by default."""
    truncation_direction: Literal["Right", "right"] = "Right"
    """Texts are cut at their end."""


class Compared(BaseModel):
    """A sentence, and the sentences that it is compared with."""

    model_config = ConfigDict(extra="forbid")

    source_sentence: str
    sentences: Annotated[list[str], FailFast()]


class HowCompared(BaseModel):
    """Options of a comparison, as in TEI."""

    model_config = ConfigDict(extra="forbid")

    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: str | None = None


class SimilarityBody(Body):
    """Body of ``/similarity``."""

    inputs: Compared
    parameters: HowCompared = HowCompared()

    @model_validator(mode="after")
    def take_parameters(self) -> Self:
        """Move TEI's parameters to the fields of the same names, which all bodies have."""
        for name in ("truncate", "prompt_name"):
            given = getattr(self.parameters, name)
            if given is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} is given twice")
            if given is not None:
                setattr(self, name, given)
        return self


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Number of tokens of all inputs, special tokens such as BOS included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Answer of ``/v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ModelAnswer(BaseModel):
    """One model of ``/v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["unmasked"] = "unmasked"
    dimensions: int
    max_tokens: int
    prompts: list[str]


class ModelsAnswer(BaseModel):
    """Answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error, in OpenAI's format."""

    error: Fault


Asked = TypeVar("Asked", bound=Body)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """Parse and check a body.

    Raises:
        Refusal: the body is invalid; the message contains names of fields, never their content.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _misfit(kind, error) from None
    prompts = [
        name for name in ("prompt", "prompt_name", "input_type") if getattr(asked, name) is not None
    ]
    if len(prompts) > 1:
        said = f"{' and '.join(prompts)} exclude each other. Fix: give one of them."
        raise Refusal(400, said, "conflict", prompts[1])
    return asked


def _fields_of(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The fields that a body has at a path, such as those of ``inputs``."""
    for part in path:
        inner: Any = kind.model_fields[part].annotation
        kind = inner
    return list(kind.model_fields)


def _misfit(kind: type[Body], error: ValidationError) -> Refusal:
    """The refusal for one of the faults that pydantic found in a body.

    That is an unknown field, if there is one, as a misspelt field is a missing one too.
    """
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    where = [str(part) for part in first["loc"]]
    field = where[0] if where else None
    if first["type"] == "json_invalid":
        said = f"the body cannot be read as JSON. {first['msg']}. Fix: send one JSON object."
        return Refusal(400, said, "invalid_json")
    if first["type"] == "extra_forbidden":
        fields = _fields_of(kind, where[:-1])
        return Refusal(400, unknown("field", where[-1][:64], fields), "unknown_field")
    if field in ("input", "inputs") and first["type"] != "missing" and kind is not SimilarityBody:
        return Refusal(
            400, f"{field} is not {KINDS}. Fix: give one of them.", "invalid_type", field
        )
    path = ".".join(part[:64] for part in where) or "the body"
    said = f"{path}: {first['msg']}. Fix: see this field in /docs."
    return Refusal(400, said, str(first["type"]), field)
