"""Use an installed orpo_kernels as its user would; run by `tools/dist.py` in a clean environment.

    python try_install.py core  --backend c++ --version 0.1.0   # needs torch only
    python try_install.py train --backend c++ --version 0.1.0   # needs the extra `hf`

`core`: version, type information, `orpo-kernels selftest`, two steps over `orpo_loss`. `train`:
two steps of `orpo-kernels train` with a LoRA on a model made on the spot. Exit status 1, and why,
where something is not as it should be; the last line printed is JSON: versions and what was found.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets")


def demand(true: bool, message: str) -> None:
    """Leave with a message unless something is true."""
    if not true:
        sys.exit(f"try_install: {message}")


def command(*words: str) -> str:
    """What an `orpo-kernels` command prints."""
    done = subprocess.run(["orpo-kernels", *words], capture_output=True, text=True, check=False)
    demand(done.returncode == 0, f"orpo-kernels {' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def installed(version: str) -> None:
    """The package is the installed one, whole, with its types, and no compiler could help."""
    import orpo_kernels

    folder = Path(orpo_kernels.__file__).parent
    site = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    demand(str(folder.parent) in site, f"imported from {folder}")
    demand(orpo_kernels.__version__ == version, f"version {orpo_kernels.__version__}")
    demand(metadata.version("orpo_kernels") == version, "the metadata name another version")
    demand(version in command("--version"), "the command names another version")
    demand((folder / "py.typed").is_file(), "no type information")
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang", "cl") if shutil.which(name)]
    demand(not compilers, f"a compiler is on PATH: {compilers}")


def checked(backend: str) -> None:
    """The self-test passes, on the tile operations that this file should bring."""
    report = json.loads(command("selftest", "--json", "--device", "cpu"))
    demand(report["passed"], f"selftest: {report['advice']}")
    # Some operations have a plain form only.
    natives = [name for name, used in report["backends"].items() if used == "c++"]
    demand(bool(natives) == (backend == "c++"), f"in C++: {natives}, expected {backend}")


def two_steps() -> None:
    """Two steps of gradient descent over `orpo_loss` lower it."""
    import torch

    from orpo_kernels import orpo_loss

    torch.manual_seed(0)
    hidden = torch.randn(4, 16, 64, requires_grad=True)
    weight = torch.randn(1000, 64)
    labels = torch.randint(0, 1000, (4, 16))
    losses = []
    for _ in range(3):
        loss = orpo_loss(hidden, weight, labels, beta=0.1).loss
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, hidden)
        with torch.no_grad():
            hidden -= 10 * gradient
    demand(losses[0] > losses[1] > losses[2], f"the loss does not fall: {losses}")


def train() -> None:
    """Two steps of `orpo-kernels train`, on the model and the pairs of the demo."""
    sys.path.insert(0, str(Path.cwd()))
    from examples import synthetic, tiny_base

    pairs = synthetic.preference_pairs(12)
    data = str(synthetic.write_jsonl("data/train.jsonl", pairs))
    size = tiny_base.Size(hidden_size=32, layers=1, steps=2)
    tiny_base.build(pairs, Path("base"), size)
    flags = {
        "model_name_or_path": "base", "dataset_name": data, "output_dir": "out",
        "use_peft": "true", "lora_target_modules": "all-linear", "max_length": "128",
        "max_steps": "2", "logging_steps": "1", "per_device_train_batch_size": "2",
        "use_cpu": "true",
    }  # fmt: skip
    command("train", *(f"--{name}={value}" for name, value in flags.items()))
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    demand(len(losses) == 2, f"two steps were asked for, {len(losses)} logged")
    demand(all(map(math.isfinite, losses)), f"losses {losses}")
    demand(Path("out/adapter_model.safetensors").is_file(), "no adapter was saved")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["core", "train"])
    parser.add_argument("--backend", choices=["c++", "torch"], required=True)
    parser.add_argument("--version", required=True)
    options = parser.parse_args()
    installed(options.version)
    if options.what == "core":
        checked(options.backend)
        two_steps()
    else:
        train()
    present = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    about = {name: present[name] for name in LIBRARIES if name in present}
    python = ".".join(map(str, sys.version_info[:3]))
    print(json.dumps({"passed": True, "backend": options.backend, "python": python, **about}))


if __name__ == "__main__":
    main()
