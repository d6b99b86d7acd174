"""Models written in formats that others read without actkit: compressed-tensors (transformers, vLLM) and GGUF.

What a format cannot say is refused by name, or written dense and listed in what `export` returns: see docs/formats.md.
"""
