"""The original `llm2vec` (0.2.3) as a process of its own, because it needs transformers 4.44.

Run by `benchmarks.encode --upstream-python`, with the interpreter that has it. Reads a JSON list of
texts a line and answers with wall and CPU seconds; the first line answered says it is ready. It
imports nothing of this project.
"""

import json
import sys
import time

import torch
from llm2vec import LLM2Vec


def main():
    folder, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # the package prints
    model = LLM2Vec.from_pretrained(
        folder,
        torch_dtype=getattr(torch, dtype),
        pooling_mode="mean",
        max_length=512,
        doc_max_length=512,
    )
    model.eval()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        model.encode(texts, batch_size=32, show_progress_bar=False)
        seconds = [time.perf_counter() - wall, time.process_time() - cpu]
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
