"""What is a stage's loss?

One file for each: `mntp` (with what is masked), `simcse` (with the noise that makes two views) and
`supervised`. MNTP's loss is a module that the trainer runs as its model. The others are losses as
sentence-transformers calls them, with a list of features and with labels, so a new contrastive loss
goes here as a class like `simcse.TwoViewsLoss`: ``model`` is the encoder, ``views`` says how often
it runs each token, and ``measured`` holds scalars that are logged beside the loss. `train.fitting`
then gives it data and a trainer.

Others may use the classes and functions without a leading underscore. Cost: importing torch,
transformers and sentence-transformers.
"""
