"""How do texts of any number become vectors on disk, when neither fit in memory?

The output is one file, which appears only when it is complete, or a folder of shards with a
manifest, written by one machine or many; the same command resumes it. Row i of the output is row i
of the input, or the row's number is stored beside the vector. A row without a vector is an error,
or is listed, so nothing is lost silently.

The path of a row: `files.source` reads it; an engine (`Local` in this process, `OnRay` in many) has
its shard written; `shards` encodes it in a window of rows; `stored_vectors` decides how, and in
which precision it is stored; `writers` puts it into the file; `manifest` records the shard.

Cost: files are read once more beforehand, to check and count every row (a few hundred thousand rows
per second), and memory holds one window of texts and vectors. Texts are sorted by length within a
window, so larger windows waste less computation on padding.

Others may use the names below.
"""

from unmasked.corpus.local import Load, Local, Progress
from unmasked.corpus.manifest import Manifest, parse_part
from unmasked.corpus.one_file import check_output, encode_corpus
from unmasked.corpus.ray import OnRay
from unmasked.corpus.shard_folder import encode_folder
from unmasked.corpus.shards import Encoded, Shards
from unmasked.corpus.stored_vectors import PRECISIONS, Encoding, encode_passages, skipped_of
from unmasked.corpus.writers import OUTPUTS
from unmasked.text.passages import Chunks, Passage

__all__ = [
    "OUTPUTS",
    "PRECISIONS",
    "Chunks",
    "Encoded",
    "Encoding",
    "Load",
    "Local",
    "Manifest",
    "OnRay",
    "Passage",
    "Progress",
    "Shards",
    "check_output",
    "encode_corpus",
    "encode_folder",
    "encode_passages",
    "parse_part",
    "skipped_of",
]
