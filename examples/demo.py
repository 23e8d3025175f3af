"""`make demo`: a causal LM is ORPO-fine-tuned through orpo_kernels, from nothing, in minutes.

Nothing is downloaded: the data are generated, the tokenizer is trained, the base model is a Llama
of a million parameters. What follows is what a user does with a real model: the base is loaded in
nf4, a LoRA is trained on preference pairs by `orpo-kernels train`, and its report is drawn. The
same run with beta = 0 (plain fine-tuning on the chosen answers) stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from orpo_kernels import cli

CONFIG = os.path.relpath(Path(__file__).with_name("demo.yaml"))
CLEAR_RISE = 0.1  # of the held-out reward accuracy; less counts as failed
# The base has met these, and the tones of all answers; counting and comparing numbers are new.
# So fine-tuning has something to teach that chosen and rejected answers share, as in life.
KNOWN = ("arithmetic", "capitals", "lists", "words")


def main() -> int:
    """Run the demo; exit status 1 if the held-out reward accuracy did not clearly rise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, to test the demo")
    options = parser.parse_args()
    cli.quiet()  # before these imports, which are slow and talkative
    from examples import tiny_base
    from examples.synthetic import FAULTS, preference_pairs, write_jsonl

    # The matrices are small: more threads would wait for each other, not work.
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // 2)))
    started = time.monotonic()
    out: Path = options.out
    clear(out)

    stage(1, "preference data: right, polite, short answers against wrong, rude, rambling ones")
    count, held = (36, 18) if options.smoke else (400, 120)
    train, heldout = preference_pairs(count), preference_pairs(held, split="heldout")
    write_jsonl(out / "data" / "train.jsonl", train)
    write_jsonl(out / "data" / "test.jsonl", heldout)
    print(f"  {len(train)} pairs to train on, {len(heldout)} held out (other questions)")
    for fault in FAULTS:
        show(next(pair for pair in train if pair["fault"] == fault))

    stage(2, "a base model that knows the domain, but not which answers are preferred")
    known = [pair for pair in train if pair["category"] in KNOWN]
    tiny_base.build(known, out / "base", tiny_base.Size(steps=4 if options.smoke else 70))

    flags = [f"--model_name_or_path={out}/base", f"--dataset_name={out}/data"]
    if options.smoke:
        flags += ["--max_steps=4", "--eval_steps=2", "--logging_steps=1", "--warmup_steps=0"]
    stage(3, "ORPO with LoRA on the base in nf4")
    command("train", CONFIG, *flags, f"--output_dir={out}/orpo")
    stage(4, "the same with beta = 0: fine-tuning on the chosen answers alone")
    command("train", CONFIG, *flags, f"--output_dir={out}/sft", "--beta=0")
    stage(5, "side by side: fine-tuning alone lifts the rejected answers too, ORPO holds them down")
    command("report", out / "orpo", out / "sft", f"--output={out}/orpo-vs-sft.png")

    risen = verdict(out)
    print(f"demo finished in {time.monotonic() - started:.0f} s; everything is in {out}")
    return 0 if risen or options.smoke else 1


def clear(out: Path) -> None:
    """Remove an earlier demo; refuse a folder that holds anything else."""
    if out.exists() and any(out.iterdir()) and not (out / "data" / "train.jsonl").is_file():
        sys.exit(f"{out} is not empty and not from an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)


def stage(number: int, title: str) -> None:
    """Announce a stage."""
    print(f"\n[{number}/5] {title}", flush=True)


def show(pair: Any) -> None:
    """Print a pair."""
    print(f"  {pair['prompt'][0]['content']}  ({pair['fault']})")
    print(f"    chosen:   {pair['chosen'][0]['content']}")
    print(f"    rejected: {pair['rejected'][0]['content']}")


def command(*words: object) -> None:
    """Print and run an `orpo-kernels` command; a failure ends the demo."""
    words_ = [str(word) for word in words]
    print(f"$ orpo-kernels {' '.join(words_)}", flush=True)
    status = cli.main(words_)
    if status:
        sys.exit(status)


def verdict(out: Path) -> bool:
    """Print held-out figures before and after; return whether the accuracy clearly rose."""
    runs = {name: json.loads((out / name / "metrics.json").read_text()) for name in ("orpo", "sft")}
    print(f"\nheld-out pairs           {'before':>9}{'ORPO':>9}{'SFT alone':>11}")
    for label, key in (
        ("reward accuracy", "rewards/accuracies"),
        ("log-prob of chosen", "logps/chosen"),
        ("log-prob of rejected", "logps/rejected"),
    ):
        before, orpo = (runs["orpo"][when][key] for when in ("eval_first", "eval_last"))
        print(f"  {label:<22} {before:>9.3f}{orpo:>9.3f}{runs['sft']['eval_last'][key]:>11.3f}")
    first, last = (runs["orpo"][when]["rewards/accuracies"] for when in ("eval_first", "eval_last"))
    risen = bool(last >= first + CLEAR_RISE)
    if not risen:
        print(f"the reward accuracy did not rise by {CLEAR_RISE}: {first:.3f} -> {last:.3f}")
    return risen


if __name__ == "__main__":
    sys.exit(main())
