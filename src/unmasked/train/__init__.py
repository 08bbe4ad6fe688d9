"""How does a decoder become an encoder: which stages, on what, and what does it cost?

The answer is a run folder: `run.Run` does the stages of a recipe that are not done (MNTP, SimCSE,
supervised), scores between them, and saves the merged encoder; the same call continues a run that
was cut off, to the same weights. Cost: that of the stages, which `plan` tells beforehand.

Others may use:
    run           `Run`, `Listener`
    preflight     what is refused before anything is written
    stages        one function per stage: its data, its loss, its trainer
    fitting       what the stages share: adapters, the loop, what is kept
    trainer       transformers' `Trainer` through its public methods
    callback      metrics that resume exactly, Ctrl-C, whole checkpoints
    checkpoints   what is trained, on disk and back
    devices       several processes: who writes, who waits, how work is shared
    losses/       a new loss goes here
    data/         texts and rows, read, kept and dealt into batches
    checking/     is the data safe to train on?
    mining/       hard negatives, found by an encoder
    plan/         what a recipe will cost
"""
