"""Which problems are measured: heads by name, cases, and one rule for smaller machines.

H hidden size, V vocabulary, P pairs, N scored tokens (what our loss multiplies; chosen prompt and
answer, rejected answer). The rule, `sizes_of`:

- on a GPU every head runs at its true size with N = 8,192 (head `cpu`: N = 1,024);
- on a CPU N and V are divided by 16 and H is kept, so that the ratio of the passes to each other
  and the shape of the tiles stay what they are; head `cpu` alone runs at its true size there; in
  float32, where a pass takes four to five times as long, N is divided by another 4;
- `tiny` (tests, dry runs): H / 16, V / 128, N = 96, rounded up to multiples of 8.
"""

from dataclasses import asdict, dataclass
from typing import Any

MODES = ("frozen", "trainable", "eval")
LOGITS = ("trained", "flat")
CPU_DIVISOR = 16
TINY_TOKENS = 96  # two chat-like sequences of ~50 tokens: enough for every branch of the harness


@dataclass(frozen=True)
class Head:
    """The output projection of a model: `weight` is (vocab_size, hidden_size)."""

    hidden_size: int
    vocab_size: int
    softcap: float | None = None
    tokens: int = 8192


HEADS = {
    "opt-125m": Head(768, 50_272),
    "qwen2.5-0.5b": Head(896, 151_936),
    "gemma-3-1b": Head(1152, 262_144),
    "llama-3.2-1b": Head(2048, 128_256),
    "gemma-2-2b": Head(2304, 256_000, softcap=30.0),
    "mistral-7b": Head(4096, 32_000),
    "llama-3-8b": Head(4096, 128_256),
    "cpu": Head(1024, 128_256, tokens=1024),
}


@dataclass(frozen=True)
class Sizes:
    """What is really run: see the rule above."""

    hidden_size: int
    vocab_size: int
    tokens: int
    softcap: float | None = None


@dataclass(frozen=True)
class Case:
    """One measured problem. `sizes`, when given, overrides the rule (memory sweeps)."""

    head: str = "cpu"
    mode: str = "frozen"
    logits: str = "trained"
    pairs: int = 1
    dtype: str = "bfloat16"
    sizes: Sizes | None = None

    @property
    def group(self) -> str:
        """Name of the table this case belongs to; also what `run.py` resumes by."""
        return f"{self.head} {self.mode} {self.logits} P{self.pairs} {self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for the process that measures memory."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Case":
        """The inverse of `as_dict`."""
        sizes = values.get("sizes")
        return cls(**{**values, "sizes": None if sizes is None else Sizes(**sizes)})


def sizes_of(case: Case, device: str, *, tiny: bool = False) -> Sizes:
    """The sizes `case` runs at on `device` ("cpu", "cuda")."""
    if case.sizes is not None and not tiny:
        return case.sizes
    head = HEADS.get(case.head, HEADS["cpu"])
    hidden, vocab, tokens = head.hidden_size, head.vocab_size, head.tokens
    if tiny:
        hidden, vocab, tokens = hidden // 16, vocab // 128, TINY_TOKENS
    elif device == "cpu" and case.head != "cpu":
        vocab, tokens = vocab // CPU_DIVISOR, tokens // CPU_DIVISOR
    if device == "cpu" and case.dtype == "float32" and not tiny:
        tokens //= 4
    return Sizes(_up_to_8(hidden), _up_to_8(vocab), tokens, head.softcap)


def _up_to_8(size: int) -> int:
    return -(-size // 8) * 8
