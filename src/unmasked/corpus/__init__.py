"""How do texts of any number become vectors on disk, when neither fit in memory?

The answer is one file, which exists once it is whole, or a folder of shards with a manifest, which
the same command continues, on one machine or many. Row i of the output is row i of the input, or
its number stands beside the vector; a row without a vector is an error or is listed, so nothing is
lost silently.

The way of a row: `files.source` reads it; an engine (`Local` here, `OnRay` in many processes) has
its shard written; `shards` encodes it in a window of rows; `stored_vectors` says how, and in which
numbers it is stored; `writers` puts it into the file; `manifest` records the shard.

Cost: files are read once more beforehand, to check and count every row (a few hundred thousand rows
per second), and one window of texts and vectors is in memory. Within a window, texts are sorted by
length, so larger windows waste less on padding.

Others may use the names below.
"""

from unmasked.corpus.local import Load, Local, Progress
from unmasked.corpus.manifest import Manifest, parse_part
from unmasked.corpus.one_file import check_output, encode_corpus
from unmasked.corpus.ray import OnRay
from unmasked.corpus.shard_folder import encode_folder
from unmasked.corpus.shards import Encoded, Shards
from unmasked.corpus.stored_vectors import PRECISIONS, Encoding, encode_passages
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
]
