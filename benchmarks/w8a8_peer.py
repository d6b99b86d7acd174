"""torchao's int8 (dynamic activations per token, weights by row) on a saved encoder, compiled: `w8a8.py` starts it.

    python w8a8_peer.py FOLDER ROWS TOKENS THREADS

A line on standard input runs the model once; the answer is a line. The first says that it is ready, or what is wrong.
"""

import sys

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertModel

folder, rows, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = BertModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
quantize_(model, Int8DynamicActivationInt8WeightConfig())
model = torch.compile(model)
ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
with torch.inference_mode():
    model(**batch)
    print("ready", flush=True)
    for _ in sys.stdin:
        model(**batch)
        print("done", flush=True)
