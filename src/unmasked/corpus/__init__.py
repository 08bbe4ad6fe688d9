"""From texts of any number to vectors on disk, so that neither has to fit in memory.

One file, which is there once it is whole; or a folder of shards with a manifest, which the same
command continues, on one machine or many. Row i of the output is row i of the input, or its number
stands beside the vector, and a row without a vector is an error or listed: nothing is lost in
silence.

Cost: files are read once more beforehand, to check and count every row (a few hundred thousand
rows a second); memory for one window of texts and vectors. Within a window, texts are sorted by
length, so larger windows waste less on padding.
"""

from unmasked.corpus.checks import check_output, parse_part
from unmasked.corpus.encode import Encoded, Shards, encode_corpus, encode_folder
from unmasked.corpus.encoding import PRECISIONS, Encoding
from unmasked.corpus.engines import Local
from unmasked.corpus.manifest import verify
from unmasked.corpus.writers import OUTPUTS

__all__ = [
    "OUTPUTS",
    "PRECISIONS",
    "Encoded",
    "Encoding",
    "Local",
    "Shards",
    "check_output",
    "encode_corpus",
    "encode_folder",
    "parse_part",
    "verify",
]
