"""Is the data safe to train on?

`leaks`: is a text that will be scored among those to train on? Exact and cheap, asked by every run.
`copies`: exact and near copies, by MinHash. `checking`: both over files, with languages, lengths
and false negatives, and the rows without what is wrong. Cost: `leaks` a digest of every text;
`checking` about a millisecond a text, and with an encoder the encoding of it.

For others: the public names of the three files.
"""
