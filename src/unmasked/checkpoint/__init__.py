"""How does a model come from disk, and how does it go back?

Loading: `loading.find` reads everything of a checkpoint but its weights (hub, folders, chains of
adapters); `loading.load_transformer` reads the weights, opens the mask, proves it and merges the
adapters. The result is a bare transformer in evaluation mode and its proof. Saving:
`snapshot.save_encoder` collects the state of an encoder and `folder.write_folder` writes a folder
that stock loaders read. Cost: the weights are read or written once.

Other rooms may use:
    loading       `find`, `load_transformer`, `load_config`, `load_tokenizer`, `load_causal_lm`
    location      `locate`, `Location`: a folder or hub repository and single files of it
    weights       `load_model`: all weights of a checkpoint or an error
    adapters      attach, save, load and merge adapters
    folder        `Settings`, `write_folder`, `read_settings`
    snapshot      `save_encoder`, `read_options`, `load_behind`
    card          `Card`: the content of the README of a saved folder; `versions`
    fingerprint   `fingerprint`: a digest that tells one model from another
    push          `push`: uploads a saved folder to the hub
"""
