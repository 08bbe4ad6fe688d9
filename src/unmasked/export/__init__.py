"""Does the encoder give the same vectors elsewhere, and if not, why?

`exporting.export_model` writes an encoder for another engine: an ONNX or OpenVINO graph with the
pooling inside, a GGUF file for llama.cpp, or a folder for vLLM or text-embeddings-inference. The
answer is a new folder. In the end, the same twenty texts are encoded by the engine and by torch,
and different vectors are an error. `verifying.verify_target` asks a running server, or another
folder, for the same vectors. If they differ, it tries the usual mistakes to find the one that
explains the difference.

Cost: an export loads the model twice and traces it once, which takes a minute for a small model. A
check encodes some sixty texts, and as many for each mistake that is tried. The engines come with
the extra ``export`` and are imported only when they are needed.
"""
