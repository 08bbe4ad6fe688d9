"""What is a stage's loss?

One file for each: `mntp` (and the masking), `simcse` (and the dropout that makes two views) and
`supervised`, which `teacher` and `depth` extend. MNTP's loss is a module that the trainer runs as
its model. The others have the interface of sentence-transformers' losses: they are called with a
list of features and with labels. A new contrastive loss goes here as a class like
`simcse.TwoViewsLoss`: ``model`` is the encoder, ``views`` says how often it runs each token, and
``measured`` holds scalars that are logged beside the loss. `train.stages` gives it data and a
trainer.

Others may use the classes and functions without a leading underscore. Cost: importing torch,
transformers and sentence-transformers.
"""
