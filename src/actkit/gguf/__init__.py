"""GGUF, the files of llama.cpp: what they hold, and one plain checkpoint made of each."""
