"""How is a text computed?

Token ids go in, vectors come out: texts of similar length share a forward (`batches`, `loop`), the
real tokens of a batch are laid end to end so that padding is never computed (`packing`,
`backbone`), and the states of the text's own tokens become one vector (`pooling`) or one per word
(`words`). Training, encoding, evaluating and serving all take this one path. It costs the forward
of the real tokens; the rest happens in threads while the device computes the previous batch.

Other rooms use:

* `backbone`: `Backbone` and `collate`.
* `batches`: `plan_batches`, `token_budget`.
* `packing`: `enable_packing`, `pack`, `pack_documents`, `run_packed`, `checkpoint_contexts`.
* `positions`: rotary positions that depend on the other texts of a batch.
* `precision`: `pick`, which dtype the weights get and why. `quantization`: 8-bit weights.
* `geometry`: alignment and uniformity of vectors. `nearest`: exact search block by block.
* `pooling`, `loop` and `words` are mostly used through `unmasked.model`.
"""
