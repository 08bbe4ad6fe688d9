"""What will a recipe cost?

`cost.make_plan` answers with a `Plan`: for each stage the steps, tokens, trainable parameters,
FLOPs, bytes of memory per device and bytes of disk; with a probe, also the seconds. Only the config
and the tokenizer are fetched, never weights. Cost: a few seconds, most of it reading and tokenising
512 texts; a probe adds real training steps of two shallow models.

`shapes` counts parameters and activations on torch's meta device, where tensors have a shape and no
memory. Others may use `cost.make_plan`, `cost.Plan`, `cost.StagePlan` and `shapes.trained_trunk`,
which puts a stage's adapter on a model.
"""
