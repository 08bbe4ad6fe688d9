"""How does a model come from disk, and how does it go back?

The way in: `loading.find` reads everything of a checkpoint but its weights (hub, folders, chains of
adapters); `loading.load_transformer` reads the weights, opens the mask, proves it and merges the
adapters. The answer is a bare transformer in evaluation mode and its proof. The way out:
`folder.write_folder` writes a folder that stock loaders read. Cost: the weights are read or written
once.

Others may use:
    loading       `find`, `load_transformer`, `load_config`, `load_tokenizer`, `load_causal_lm`
    location      `locate`, `Location`: a folder or hub repository and single files of it
    weights       `load_model`: all weights of a checkpoint or an error
    adapters      attach, save, load and merge what trains
    folder        `Settings`, `write_folder`, `read_settings`, `read_prompts`
    card          `Card`: what the README of a saved folder says; `versions`
    fingerprint   `fingerprint`: a digest that tells one model from another
    push          `push`: a saved folder onto the hub
"""
