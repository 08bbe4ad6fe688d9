"""Which texts are there, and how is a file written so that it is never incomplete?

Reading yields rows, one at a time, each checked: a text with its file, its line and perhaps an id,
or a fault that says what is wrong and how to correct it. Others use `source.Source` (all texts of a
file, folder, data set or standard input), `source.find_files`, and, for columns other than texts,
`readers.read`, `readers.read_tsv` and `readers.checked`.

Writing goes through `writing.written_aside` (a file), `writing.folder_aside` (a folder) and
`writing.write_text`. `docstrings.collect` finds texts that every machine has.

Cost: files are read line by line and never held in memory; see each module. Importing any of them
loads neither torch nor transformers.
"""
