"""Which texts rank high for a query and are no answer to it?

`mining` reads rows of query and positive, and writes them with hard negatives. A million rows do
not fit into memory as vectors, nor does their product: `work_folder` keeps rows and vectors on the
disk, so that memory holds a shard of each and the same command continues what was cut off;
`band` searches them block by block. Cost: encoding each distinct text once, a pass over the
documents for every `work_folder.SHARD` queries, and 4 bytes of disk for each number of each vector.

For others: `mining.mine`.
"""
