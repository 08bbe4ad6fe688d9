"""How does a decoder become an encoder: which stages, on which data, and at what cost?

The answer is a run folder: `run.Run` trains the stages of a recipe that are not finished (MNTP,
SimCSE, supervised), scores the encoder between them, and saves the merged encoder. The same call
continues an interrupted run and ends with the same weights. Cost: that of the stages, which `plan`
estimates beforehand.

Others may use:
    run           `Run`, `Listener`
    preflight     the checks that a recipe must pass before anything is written
    stages        one function per stage: its data, its loss, its trainer
    fitting       what the stages share: adapters, the training loop, saving the result
    trainer       transformers' `Trainer` through its public methods
    callback      metrics that resume exactly, Ctrl-C, complete checkpoints
    checkpoints   the trained weights, to disk and back
    devices       several processes: which one writes, which ones wait, how work is shared
    losses/       a new loss goes here
    data/         texts and rows, read, kept and dealt into batches
    checking/     is the data safe to train on?
    mining/       hard negatives, found by an encoder
    plan/         what a recipe will cost
"""
