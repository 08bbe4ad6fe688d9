"""Does the encoder give the same vectors elsewhere, and if not, why?

`exporting.export_model` writes an encoder for another engine: an ONNX or OpenVINO graph with the
pooling inside, a GGUF file for llama.cpp, a folder for vLLM or text-embeddings-inference. The
answer is a new folder; it ends with the same twenty texts through the engine and through torch, and
an engine that differs is an error. `verifying.verify` asks a running server, or another folder, for
these vectors and, where they differ, tries the usual mistakes until one explains the difference.

Cost: an export loads the model twice and traces it once, a minute for a small model; a check is
some sixty short texts, and as many again for each mistake that is tried. The engines come with the
extra ``export``; nothing of them is imported before it is needed.
"""
