"""Is the data safe to train on?

`leaks` finds texts of the test sets in the training data, exactly and cheaply; every run does so.
`copies` finds exact and near copies by MinHash. `checking` does both for whole files, reports
languages, lengths and false negatives, and writes the rows that are sound. Cost: for `leaks` a
digest of every text; for `checking` about a millisecond per text, and with an encoder its encoding.

Others may use the public names of the three files.
"""
