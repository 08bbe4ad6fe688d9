"""Which vectors are nearest to a query, when not all of them fit into memory?

What mining and searching share: `best_scores`, the highest scores while blocks of vectors pass by.
Cost: one product of all queries with all vectors.
"""
