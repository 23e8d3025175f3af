"""One run of LLaMA-Factory as its users start it, by a file of arguments: `... ARGUMENTS [ours]`.

LLaMA-Factory imports torchaudio, which has no part in it: a module without contents stands in.
"""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

from tests.environments.page import after

STUB = types.ModuleType("torchaudio")
STUB.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = STUB

if __name__ == "__main__":
    if sys.argv[2:] == ["ours"]:
        exec(after("LLaMA-Factory"))
    else:
        from llamafactory.train.tuner import run_exp
    run_exp(json.loads(Path(sys.argv[1]).read_text()))
