"""What was asked for?

The answer is a `schema.Recipe`: all settings of a run, checked, with defaults for those that were
not given. `files.load_recipe` reads one from YAML or by its name, `files.make_recipe` takes the
flags of a command, and `files.recipe_text` writes the resolved recipe. An error names the key, its
line and the most similar key. Stages are `schema.MNTP`, `schema.SimCSE` and `schema.Supervised`.

Cost: a few milliseconds. Importing it loads neither torch nor transformers.
"""
