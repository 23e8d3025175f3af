"""What is run on which kind of machine, in order of importance: a run cut short has what matters.

Two cores get through the main head and the memory sweep, two fifths of the plan for a CPU, in 15
minutes; `run.py` stops at its deadline, says what is missing and goes on when it is called again.
"""

from collections.abc import Iterator

from benchmarks.heads import HEADS, Case, Sizes
from benchmarks.implementations import IMPLEMENTATIONS

# The fp32 table has one peer per idea: on a CPU a pass takes seconds in fp32.
FP32 = ("ours-exact", "eager", "trl-chunked", "cce")
# 31 g on a CPU for a frozen head (it widens the whole head for every 32 rows): once is enough.
SLOW_ON_CPU = ("torch-lce",)
# Measured on the main head only: 5 to 20 s of compilation per shape; not what anybody should use.
MAIN_HEAD_ONLY = ("liger-compiled", "ours-exact-torch")
SWEEP = "memory"  # head name of the memory sweeps: no model's


def planned(device: str) -> list[tuple[Case, str]]:
    """Every (case, implementation) of a run on `device`, without repetitions."""
    plan = _plan_gpu() if device == "cuda" else _plan_cpu()
    return list(dict.fromkeys(plan))


def _plan_cpu() -> Iterator[tuple[Case, str]]:
    for mode in ("frozen", "trainable", "eval"):
        yield from _all(Case("cpu", mode), without=() if mode == "frozen" else SLOW_ON_CPU)
    for mode in ("frozen", "trainable"):
        # CCE on a CPU is dense: only its GPU kernels look at the logits.
        yield from _all(Case("cpu", mode, "flat"), without=("cce",))
    for head in HEADS:
        if head != "cpu":
            yield from _all(Case(head, "frozen"), without=MAIN_HEAD_ONLY)
    for pairs in (2, 8):
        yield from _all(Case("qwen2.5-0.5b", "frozen", pairs=pairs), without=MAIN_HEAD_ONLY)
    for head in ("opt-125m", "llama-3-8b"):
        yield from _all(Case(head, "trainable"), without=MAIN_HEAD_ONLY)
    for name in FP32:
        yield Case("cpu", "frozen", dtype="float32"), name


def _plan_gpu() -> Iterator[tuple[Case, str]]:
    first = "llama-3-8b"
    for mode in ("frozen", "trainable", "eval"):
        yield from _all(Case(first, mode))
    for mode in ("frozen", "trainable"):
        yield from _all(Case(first, mode, "flat"))
    for pairs in (2, 8):
        yield from _all(Case(first, "frozen", pairs=pairs))
    for head in HEADS:
        for mode in ("frozen", "trainable", "eval"):
            yield from _all(Case(head, mode), without=MAIN_HEAD_ONLY)


def _all(case: Case, *, without: tuple[str, ...] = ()) -> Iterator[tuple[Case, str]]:
    """The implementations that `case` says something about."""
    for each in IMPLEMENTATIONS.values():
        repeats_trained = case.logits == "flat" and not each.reads_logits
        if case.mode in each.modes and not repeats_trained and each.name not in without:
            yield case, each.name


def memory_sweep(device: str) -> list[tuple[Case, str]]:
    """Peak memory of one pair, frozen head, against T and against V; H is small, it adds nothing.

    One pair scores N = 1.63 T tokens (`lengths.py`). On a CPU: T to 2,450 at V = 32,000, and V to
    262,144 at T = 614, where whoever keeps all logits in float32 needs 4 GB.
    """
    hidden = 128 if device == "cpu" else 1024
    tokens = (1000, 2000, 4000) if device == "cpu" else (3334, 13_333, 53_333)  # T = 2k, 8k, 32k
    vocab = (32_000, 128_256, 262_144)
    along_t = [Sizes(hidden, vocab[0], each) for each in tokens]
    along_v = [Sizes(hidden, each, tokens[0]) for each in vocab[1:]]
    names = [
        each.name
        for each in IMPLEMENTATIONS.values()
        if "frozen" in each.modes and each.name not in MAIN_HEAD_ONLY
    ]
    return [
        (Case(SWEEP, "frozen", "flat", sizes=sizes), name)
        for sizes in along_t + along_v
        for name in names
    ]


def label(case: Case) -> str:
    """Group and, where they are not the head's own, sizes."""
    if case.sizes is None:
        return case.group
    sizes = case.sizes
    return f"{case.group} N{sizes.tokens} V{sizes.vocab_size} H{sizes.hidden_size}"
