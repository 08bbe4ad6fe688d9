"""Finds the nearest texts in an encoded corpus, to look at the result; not a vector database.

`stored_files` opens what `unmasked encode` wrote, without reading it into memory; `nearest` finds
the closest vectors, exactly; `looking` puts model, vectors and texts together. Cost: one pass over
the vectors per call; the first call makes another one, to measure their lengths.
"""

from unmasked.corpus.search.looking import Hit, VectorSearch, search_in, search_texts
from unmasked.corpus.search.nearest import nearest_vectors
from unmasked.corpus.search.stored_files import StoredVectors, are_vectors, open_vectors

__all__ = [
    "Hit",
    "StoredVectors",
    "VectorSearch",
    "are_vectors",
    "nearest_vectors",
    "open_vectors",
    "search_in",
    "search_texts",
]
