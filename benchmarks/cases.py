"""What is run on which kind of machine, in order of importance: a run cut short has what matters.

On a CPU everybody runs the main head, frozen and trainable, and every head, frozen; one peer per
idea the rest. Two calm cores finish it within 15 minutes; slower ones stop at the deadline, say
what is missing and go on when they are called again (`run.py`).
"""

from collections.abc import Iterator

from benchmarks.heads import HEADS, Case, Sizes
from benchmarks.implementations import IMPLEMENTATIONS

# One per idea: all logits, chunks that are recomputed (of the vocabulary, of rows), tiles that are
# recomputed, and ours.
IDEAS = ("ours-exact", "ours-sparse", "eager", "trl-chunked", "unsloth", "cce")
# 27 g on a CPU for a frozen head (it widens the whole head for every 32 rows): once is enough.
SLOW_ON_CPU = ("torch-lce",)
# Measured on the main head only: 5 to 20 s of compilation per shape; not what anybody should use.
MAIN_HEAD_ONLY = ("liger-compiled", "ours-exact-torch")
SWEEP = "memory"  # head name of the memory sweeps: no model's


def planned(device: str) -> list[tuple[Case, str]]:
    """Every (case, implementation) of a run on `device`, without repetitions."""
    plan = _plan_gpu() if device == "cuda" else _plan_cpu()
    return list(dict.fromkeys(plan))


def _plan_cpu() -> Iterator[tuple[Case, str]]:
    small = (*MAIN_HEAD_ONLY, *SLOW_ON_CPU)
    for mode in ("frozen", "trainable"):
        yield from _all(Case("cpu", mode), without=() if mode == "frozen" else SLOW_ON_CPU)
    yield from _all(Case("cpu", "eval"), only=IDEAS)
    for mode in ("frozen", "trainable"):
        # CCE on a CPU is dense: only its GPU kernels look at the logits.
        yield from _all(Case("cpu", mode, "flat"), without=("cce",))
    for head in HEADS:
        if head != "cpu":
            yield from _all(Case(head, "frozen"), without=small)
    for pairs in (2, 8):
        yield from _all(Case("qwen2.5-0.5b", "frozen", pairs=pairs), only=IDEAS)
    for head in ("opt-125m", "llama-3-8b"):
        yield from _all(Case(head, "trainable"), only=IDEAS)
    # "auto" is never sparse in float32: what it leaves out is far more than float32 rounds.
    exact = tuple(name for name in IDEAS if name != "ours-sparse")
    yield from _all(Case("cpu", "frozen", dtype="float32"), only=exact)


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


def _all(
    case: Case, *, without: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Iterator[tuple[Case, str]]:
    """The implementations that `case` says something about."""
    for each in IMPLEMENTATIONS.values():
        if only and each.name not in only:
            continue
        repeats_trained = case.logits == "flat" and not each.reads_logits
        if case.mode in each.modes and not repeats_trained and each.name not in without:
            yield case, each.name


def memory_sweep(device: str) -> list[tuple[Case, str]]:
    """Peak memory of one pair, frozen head, against T and against V; H is small, it adds nothing.

    One pair scores N = 1.63 T tokens (`lengths.py`). On a CPU: T of 512, 2,048 and 8,192 at
    V = 32,000, and V to 262,144 at T = 512, where whoever keeps all logits in float32 needs 4 GB.
    On a GPU T is 2,048, 8,192 and 32,768.
    """
    hidden = 128 if device == "cpu" else 1024
    tokens = (833, 3334, 13_333) if device == "cpu" else (3334, 13_333, 53_333)
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
