"""What was asked for?

The answer is a `schema.Recipe`: every setting of a run, checked, with a default for all that was
not given. `files.load_recipe` reads one from YAML or by its name, `files.make_recipe` takes the
flags of a command, and `files.recipe_text` writes what was resolved. A fault names key, line and
the nearest key that exists. Stages are `schema.MNTP`, `schema.SimCSE` and `schema.Supervised`.

Cost: a few milliseconds. Importing it loads neither torch nor transformers.
"""
