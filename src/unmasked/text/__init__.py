"""What is pooled?

A text becomes token ids, and the exact range of them that is the text (`tokens.TokenRow`): BOS, an
instruction and what a chat template puts around steer the model, but are not pooled. It costs one
tokenisation per text, about half as fast where a border has to be found.

Others use:

* `tokens`: `TextTokenizer`, `TokenRow`, `prepare_tokenizer`, `surrounding_ids` and `MARK`.
* `templates`: `Template`, `PLAIN`, `read_template` and `detect`. The table is `templates.yaml`.
"""
