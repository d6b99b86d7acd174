"""A script that loads exported folders with transformers alone and writes what they compute: `reading.py` starts it.

    python -P plain_reader.py JOB.json

JOB holds a list of {"folder", "dtype", "batch", "outputs", "gguf_file", "adapter"}; batch and outputs are safetensors
files. The last line on standard output is JSON: per entry the class that was loaded, or the error. actkit is never
imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read(entry: dict[str, Any]) -> dict[str, Any]:
    """Load one folder, run the batch, write the outputs. Raises ValueError if keys are missing or unexpected."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    extra = {} if entry["gguf_file"] is None else {"gguf_file": entry["gguf_file"]}
    config = transformers.AutoConfig.from_pretrained(entry["folder"], **extra)
    names = config.architectures or []
    cls: Any = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(
        entry["folder"],
        dtype=getattr(torch, entry["dtype"]),
        output_loading_info=True,
        local_files_only=True,
        **extra,
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{entry['folder']}: the weights do not fit {cls.__name__}: {wrong}.")
    if entry["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, entry["adapter"])
    with torch.no_grad():
        output = model.eval()(**load_file(entry["batch"]))
    logits = output.logits if hasattr(output, "logits") else output[0]
    save_file({"outputs": logits.float().contiguous()}, entry["outputs"])
    return {"model": cls.__name__}


def main() -> None:
    """Read the entries of the file named on the command line, and print what was found."""
    found = []
    for entry in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            found.append(read(entry))
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    if any(name == "actkit" or name.startswith("actkit.") for name in sys.modules):
        found = [{"error": "actkit was imported; this reader must do without it"}] * len(found)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
