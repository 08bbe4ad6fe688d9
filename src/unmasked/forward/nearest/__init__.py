"""Which vectors are nearest to a query, if not all of them fit into memory?

Mining and searching share `best_scores`, which keeps the highest scores while the vectors are read
block by block. Cost: one product of all queries with all vectors.
"""
