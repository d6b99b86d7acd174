"""What a process that only decodes holds in memory: `python resident.py FOLDER THREADS [CAPACITY]`.

The folder is one that actkit saved, or a packed one. Prints JSON: bytes that are resident after some tokens, how many
of them are the process's own and how many are pages of files (shared with others that map them), the largest there
were; and the seconds of imports, of loading, and of the first token.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"
STARTED = time.perf_counter()


def main(folder: str, threads: int, capacity: int) -> None:
    import torch

    from actkit.core.store.mapped_arrays import HEADER
    from actkit.runtime.decoder import Decoder

    torch.set_num_threads(threads)
    if (Path(folder) / HEADER).exists():
        from actkit.runtime.packed import open_packed as opened
    else:
        from actkit.core.store.opening import open_pending as opened
    imported = time.perf_counter()
    decoder = Decoder(opened(folder), capacity=capacity)
    ready = time.perf_counter()
    decoder([1])
    first = time.perf_counter()
    seconds = []
    for token in range(2, 34):
        start = time.perf_counter()
        decoder([token])
        seconds.append(time.perf_counter() - start)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    print(
        json.dumps(
            {
                "resident_bytes": sizes["VmRSS"],
                "own_bytes": sizes["RssAnon"],
                "file_bytes": sizes["RssFile"],
                "peak_bytes": sizes["VmHWM"],
                "weight_bytes": decoder.nbytes,
                "cache_bytes": decoder.cache_bytes,
                "import_seconds": imported - STARTED,
                "load_seconds": ready - imported,
                "first_token_seconds": first - ready,
                "tokens_per_second": 1 / sorted(seconds)[len(seconds) // 2],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 512)
