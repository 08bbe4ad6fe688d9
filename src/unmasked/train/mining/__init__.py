"""Which texts rank high for a query without answering it?

`mining` reads rows of query and positive, and writes them with hard negatives. The vectors of a
million rows, and all their scores, may not fit into memory: `work_folder` keeps rows and vectors on
the disk, so that memory holds one shard of each and the same command continues an interrupted one;
`band` searches them block by block. Cost: encoding each distinct text once, a pass over the
documents for every `work_folder.SHARD` queries, and 4 bytes of disk for each number of each vector.

Others may use `mining.mine`.
"""
