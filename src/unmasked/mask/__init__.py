"""Is the mask open?

The answer is a `proof.Proof`: ``full``, ``partial`` or ``impossible``, with the reason and the
layers that still read from left to right. `proof.prove` takes eleven forwards of at most 12 rows by
16 tokens: 0.03 s for a tiny model. The flag that opens most families is kept in a saved config.

Other rooms use:

* `opening`: `open_config` before loading; `attention_name`, `decoder_of`, `learned_positions`,
  `window` and `NATIVE_KEY` to read properties of a config or a model.
* `proof`: `open_mask` (open a loaded model and prove it), `prove`, `require`, `stock_loading`,
  `evaluating` and `Proof`.
"""
