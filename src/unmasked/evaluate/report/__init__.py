"""What did a run do? One HTML page, and its figures as PNG and SVG.

`page` gathers the content and `report.html` is its template; `samples` chooses the texts that are
shown; `figures` draws, in the style of `report.mplstyle`. Cost: see `page`; requires matplotlib.

Others may use `page.write_report`, and `figures` for figures outside a report.
"""
