"""Seconds of `orpo-kernels selftest` as users run it: nothing compiled, and all compiled.

python -m tests.gpu.self_times [--json FILE] [--tiny] [--device cpu]

`wall_s` is the command's, importing torch included; `seconds` what the self-test counts, which is
to be at most 20 and 5. With `--tiny` it runs once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(name: str, device: str, cache: str) -> dict[str, Any]:
    """One run of the command, with Triton's cache in a folder."""
    command = [sys.executable, "-m", "orpo_kernels", "selftest", "--json", "--device", device]
    begin = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": cache}
    )
    wall_s = time.perf_counter() - begin
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the self-test ended with {done.returncode}: {done.stderr[-1000:]}")
    report = json.loads(done.stdout)
    return {
        "name": name, "wall_s": round(wall_s, 2), "seconds": round(report["seconds"], 2),
        "checks": len(report["checks"]),
        "failed": [check for check in report["checks"] if not check["passed"]],
        "skipped": report["skipped"],
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    names = ("cold",) if args.tiny else ("cold", "warm")
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        for name in names:
            runs.append(run(name, args.device, cache))
            found = runs[-1]
            sys.stdout.write(
                f"{name}: {found['wall_s']} s, of which the self-test counts {found['seconds']}; "
                f"{found['checks']} checks, {len(found['failed'])} failed\n"
            )
            sys.stdout.writelines(f"  {each}\n" for each in (*found["failed"], *found["skipped"]))
            if args.json is not None:
                args.json.write_text(json.dumps({"selftest": runs}, indent=1))
    return int(any(each["failed"] for each in runs))


if __name__ == "__main__":
    sys.exit(main())
