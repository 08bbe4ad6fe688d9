"""What did a run do? One HTML page, and its figures as PNG and SVG.

`page` gathers what is said and `report.html` is its template; `samples` chooses the texts that are
shown; `figures` draws, in the look of `report.mplstyle`. Cost: see `page`; matplotlib is needed.

For others: `page.write_report`, and `figures` for drawings outside a report.
"""
