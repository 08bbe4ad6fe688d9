"""What is pooled?

A text becomes token ids, and the exact range of them that is pooled (`tokens.TokenRow`). BOS, an
instruction and a chat template around the text steer the model, but are not pooled. The cost is one
tokenisation per text, at about half the speed if there is an instruction or a template.

Other rooms use:

* `tokens`: `TextTokenizer` and `TokenRow`.
* `inputs`: `listed` and `split_pairs`, which check the inputs of `encode`.
* `special_tokens`: `prepare_tokenizer`, `surrounding_ids` and `MARK`.
* `templates`: `Template`, `PLAIN`, `read_template` and `detect`. The table is `templates.yaml`.
* `passages`: `Chunks`, `divide` and `windows_of`, which divide long texts.
"""
