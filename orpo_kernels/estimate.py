"""Will it fit? The GPU memory of an ORPO run, item by item, before anything is loaded.

Counted exactly, from the model built without memory ("meta" tensors): parameters, their gradients,
optimizer states, the adapter. By formula, for decoders of Llama's kind: activations. With P pairs
and S = 2 P T tokens (every sequence at full length T), hidden size H, MLP size I, width of all
queries Q and of all keys K, L layers, r the adapter's rank, in bytes:

    a layer's activations    S (18 H + 8 I + 6 Q + 4 K + 14 r)   frozen 16-bit weights with LoRA
                             S (26 H + 8 I + 4 Q + 4 K)          trained float32 weights
                             as the first with 26 H              nf4, the rest in float32
    kept in the forward      L times that, or with checkpointing L S (2 H or 4 H): layer inputs
    the backward of a layer  with checkpointing its activations again; and S (18 H + 7 I) for
                             gradients
    around the head          12 S H: last hidden states, their norm, their gradient
    in rows                  with a layout, see below: 4 S H to put back hidden states and their
                             gradient, and 3 R L^2 for a dense mask, in bytes and in 16 bits
    the loss                 ours: `workspace_bytes`; materialised: 7 S V

The first three agree within 5 % with the tensors Llama and Qwen2 of transformers 5.23 make on a CPU
(SDPA attention; `tests/test_estimate.py`). 7 bytes per logit is what TRL 1.16's ORPO trainer takes
under bf16 autocast on an H200 (18 in float32), where the peaks of ours and theirs are within 10 %
of this. 16-bit mixed precision is assumed.

All of a batch is as long as it may be, so "packed" saves nothing: the layers have S = 2 P T tokens
too, in R = 2 P rows of L = T. "shared_prompt" computes the N tokens that a pair begins with once:
P (2 T - N) tokens, in R = P rows of L = 2 T - N, where a mask of that length costs less than two of
T (`orpo_kernels.layout`). What builds the logits is padded. Not counted: fragmentation and the CUDA
context (`RESERVED_BYTES` of a card), attention masks, an eager attention's T x T
scores, experts of an MoE model beyond its MLP size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from orpo_kernels.constants import DEFAULT_WORKSPACE_BYTES

RESERVED_BYTES = 3 * 2**30 // 4
"""Of a card: CUDA context, kernels, a desktop, what the allocator cannot use."""

MATERIALISED_BYTES_PER_LOGIT = 7
_NF4_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}  # by double quantisation
# Bytes of optimizer state per trained parameter of 4 bytes; by the beginning of the name.
_OPTIMIZER_BYTES = {
    "paged_adamw_8bit": 2.1, "adamw_8bit": 2.1, "adamw_bnb_8bit": 2.1, "adamw_torch_8bit": 2.1,
    "adamw_torch_4bit": 1.1, "paged_lion_8bit": 1.05, "lion_8bit": 1.05, "lion": 4.0,
    "paged_lion": 4.0, "adafactor": 0.1, "sgd": 0.0, "adagrad": 4.0, "rmsprop": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How the model is trained; the defaults are the QLoRA of `examples/llama3-8b-qlora.yaml`.

    Args:
        weight_bytes: of an unquantised, frozen or trained parameter: 2 or 4.
        load_in_4bit: quantise the linear layers but the head.
        double_quant: quantise the quantisation constants.
        lora_r: rank of the adapter on `lora_targets`; 0 trains all parameters instead.
        lora_targets: names of the adapted layers; "all-linear": all but the head.
        modules_to_save: modules trained in full beside the adapter.
        optim: name in `TrainingArguments`.
        checkpointing: recompute activations in the backward.
        offload: keep the inputs of checkpointed layers in the host's memory.
        float32_rest: what is not quantised stays float32, and what is between the layers with it:
            as PEFT prepares a quantised model, which `ORPOTrainer` makes 16-bit again with bf16.
        layout: "padded", "packed" or "shared_prompt".
        dense_mask: the attention takes a mask of every pair of positions (sdpa, eager).
    """

    weight_bytes: int = 2
    load_in_4bit: bool = True
    double_quant: bool = True
    lora_r: int = 16
    lora_targets: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()
    optim: str = "paged_adamw_8bit"
    checkpointing: bool = True
    offload: bool = False
    float32_rest: bool = False
    layout: str = "padded"
    dense_mask: bool = True


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a model.

    Args:
        H: hidden size.
        I: size of the MLP.
        Q: width of all queries.
        K: width of all keys.
        L: layers.
        V: vocabulary.
        linears: (last part of the name, in, out) of the linear layers but the head.
        modules: (last part of the name, parameters in it) of all modules.
        parameters: of the model, tied ones once.
        tied: the head is the embedding.
    """

    H: int
    I: int
    Q: int
    K: int
    L: int
    V: int
    linears: tuple[tuple[str, int, int], ...]
    modules: tuple[tuple[str, int], ...]  # (last part of the name, own and inner parameters)
    parameters: int
    tied: bool

    @staticmethod
    def of(config: Any) -> Shape:
        """The shape of a `transformers` configuration, from a model without memory."""
        import torch
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
        text = config.get_text_config()
        H, heads = text.hidden_size, text.num_attention_heads
        width = getattr(text, "head_dim", None) or H // heads
        head = model.get_output_embeddings()
        linears, modules = [], []
        for path, module in model.named_modules():
            name = path.rpartition(".")[2]
            modules.append((name, sum(p.numel() for p in module.parameters())))
            if isinstance(module, torch.nn.Linear) and module is not head:
                linears.append((name, module.in_features, module.out_features))
        return Shape(
            H=H,
            I=getattr(text, "intermediate_size", None) or 4 * H,
            Q=heads * width,
            K=(getattr(text, "num_key_value_heads", None) or heads) * width,
            L=text.num_hidden_layers,
            V=text.vocab_size,
            linears=tuple(linears),
            modules=tuple(modules),
            parameters=sum(p.numel() for p in model.parameters()),
            tied=head.weight is model.get_input_embeddings().weight,
        )

    def adapter_parameters(self, setup: Setup) -> int:
        """Parameters of the LoRA and of what is trained in full beside it."""
        everything = setup.lora_targets == ("all-linear",)
        targets = (each for each in self.linears if everything or each[0] in setup.lora_targets)
        saved = sum(count for name, count in self.modules if name in setup.modules_to_save)
        return saved + sum(setup.lora_r * (inner + outer) for _, inner, outer in targets)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by item; `total_bytes` is the peak of a run with the fused loss."""

    loading_bytes: int  # until the weights are in place
    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int  # kept in the forward
    backward_bytes: int  # of one layer
    head_bytes: int
    loss_bytes: int
    materialised_loss_bytes: int
    rows_bytes: int = 0  # hidden states put back, and a dense mask; of a layout
    host_bytes: int = 0  # activations kept in the host's memory
    unfused: MemoryEstimate | None = None  # the run on logits, where not only the loss differs

    @property
    def total_bytes(self) -> int:
        """Peak of a run with this package's loss."""
        return self._peak(self.loss_bytes)

    @property
    def materialised_total_bytes(self) -> int:
        """Peak of a run that builds the logits, padded."""
        run = self.unfused or self
        return run._peak(run.materialised_loss_bytes)

    def _peak(self, loss_bytes: int) -> int:
        fixed = self.weights_bytes + self.adapter_bytes
        fixed += self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
        fixed += self.rows_bytes
        # The loss is done, and what is around the head freed, before a layer's backward begins.
        step = fixed + max(self.head_bytes + loss_bytes, self.backward_bytes)
        return max(step, self.loading_bytes)


def estimate_memory(
    config: Any,
    *,
    max_length: int = 1024,
    pairs: int = 1,
    setup: Setup | None = None,
    workspace_bytes: int | None = None,
    prompt_length: int = 0,
) -> MemoryEstimate:
    """Estimate the memory of an ORPO step.

    Args:
        config: `transformers` configuration of a causal LM.
        max_length: T, tokens of the longest sequence (prompt + answer).
        pairs: P, pairs per device and step.
        setup: how it is trained.
        workspace_bytes: cap of the fused loss; 64 MiB if None.
        prompt_length: N, tokens that both sequences of every pair begin with.

    Returns:
        Bytes by item.

    Raises:
        ValueError: `max_length` or `pairs` below 1, a prompt longer than `max_length`.
    """
    if max_length < 1 or pairs < 1:
        raise ValueError(f"max_length and pairs must be at least 1, got {max_length} and {pairs}")
    if not 0 <= prompt_length <= max_length:
        raise ValueError(f"prompt_length must be 0 to {max_length}, got {prompt_length}")
    return estimate(
        Shape.of(config), max_length, pairs, setup or Setup(), workspace_bytes, prompt_length
    )


def longest_that_fits(
    shape: Shape, card_bytes: int, pairs: int, setup: Setup, prompt_length: int = 0
) -> tuple[int, int]:
    """Largest T for a card, with the fused loss and with a materialised one; 0: none.

    Args:
        shape: of the model.
        card_bytes: memory of the card; `RESERVED_BYTES` of it are left alone.
        pairs: P.
        setup: how it is trained.
        prompt_length: N, or T where that is less.

    Returns:
        (fused, materialised), multiples of 128.
    """
    workspace = max(DEFAULT_WORKSPACE_BYTES, card_bytes // 100)
    usable = card_bytes - RESERVED_BYTES

    def largest(total: str) -> int:
        low, high = 0, 2**14  # times 128: 2 M tokens
        while high - low > 1:
            middle = (low + high) // 2
            T = 128 * middle
            found = estimate(shape, T, pairs, setup, workspace, min(prompt_length, T))
            low, high = (middle, high) if getattr(found, total) <= usable else (low, middle)
        return 128 * low

    return largest("total_bytes"), largest("materialised_total_bytes")


def estimate(
    shape: Shape,
    max_length: int,
    pairs: int,
    setup: Setup,
    workspace_bytes: int | None,
    prompt_length: int = 0,
) -> MemoryEstimate:
    """`estimate_memory` of a shape that is known already."""
    found = _estimate(shape, max_length, pairs, setup, workspace_bytes, prompt_length)
    if setup.layout == "padded" and not setup.float32_rest:
        return found
    padded = replace(setup, layout="padded")
    unfused = _estimate(shape, max_length, pairs, padded, workspace_bytes)
    if setup.float32_rest:
        # Autocast keeps a 16-bit copy of the head; the fused one narrows its own instead.
        copy = 2 * shape.V * shape.H
        loss_bytes = unfused.materialised_loss_bytes + copy
        unfused = replace(unfused, materialised_loss_bytes=loss_bytes)
        if not shape.tied:
            found = replace(found, weights_bytes=found.weights_bytes - copy)
    return replace(found, unfused=unfused)


def _estimate(
    shape: Shape,
    max_length: int,
    pairs: int,
    setup: Setup,
    workspace_bytes: int | None,
    prompt_length: int = 0,
) -> MemoryEstimate:
    S, H = 2 * pairs * max_length, shape.H
    rows, length = _rows(shape, max_length, pairs, setup, prompt_length)
    computed = rows * length
    adapter = shape.adapter_parameters(setup) if setup.lora_r else 0
    trained = adapter or shape.parameters
    trained_bytes = 4 if adapter else setup.weight_bytes
    # Float32 between the layers.
    wide = setup.float32_rest if setup.load_in_4bit else setup.weight_bytes == 4
    layer = (26 if wide else 18) * H + 8 * shape.I + 4 * (shape.Q + shape.K)
    layer += 2 * shape.Q + 14 * setup.lora_r if adapter else 0
    residual = 4 * H if wide else 2 * H
    kept = shape.L * computed * (residual if setup.checkpointing else layer)
    in_rows = setup.layout != "padded"
    mask = 3 * rows * length**2 if in_rows and setup.dense_mask else 0
    offloads = setup.offload and setup.checkpointing
    weights, loading = _weights_bytes(shape, setup)
    return MemoryEstimate(
        loading_bytes=round(loading),
        weights_bytes=round(weights),
        adapter_bytes=4 * adapter,
        gradients_bytes=trained_bytes * trained,
        optimizer_bytes=round(_optimizer_bytes(setup.optim) * trained * trained_bytes / 4),
        activations_bytes=0 if offloads else kept,
        backward_bytes=computed * (18 * H + 7 * shape.I + (layer if setup.checkpointing else 0)),
        head_bytes=12 * computed * H,
        loss_bytes=workspace_bytes or DEFAULT_WORKSPACE_BYTES,
        materialised_loss_bytes=MATERIALISED_BYTES_PER_LOGIT * S * shape.V,
        rows_bytes=4 * S * H + mask if in_rows else 0,
        host_bytes=kept if offloads else 0,
    )


def _rows(shape: Shape, T: int, pairs: int, setup: Setup, prompt: int) -> tuple[int, int]:
    """R and L of the rows that the layers compute."""

    def cost(length: int) -> float:  # as `layout.lay_out` weighs it
        return length * (1 + (length / (2 * shape.H) if setup.dense_mask else 0))

    if setup.layout == "shared_prompt" and prompt and cost(2 * T - prompt) < 2 * cost(T):
        return pairs, 2 * T - prompt
    return 2 * pairs, T


def _weights_bytes(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Of the weights in training, and at most while they are loaded."""
    sizes = [inner * outer for _, inner, outer in shape.linears]
    linear, largest = sum(sizes), max(sizes, default=0)
    if setup.load_in_4bit:
        packed, rest = linear * _NF4_BYTES[setup.double_quant], shape.parameters - linear
        # PEFT makes the rest float32, the trainer then bf16 again, with bf16; one layer at a time
        # is dequantised to 16 bits.
        width = 4.0 if setup.float32_rest else 2.0
        return packed + width * rest + 2.0 * largest, packed + 4.0 * rest
    weights = shape.parameters * float(setup.weight_bytes)
    if setup.weight_bytes == 2:
        return weights, weights
    # Autocast casts to 16 bits. Copies of trained weights stay until the forward ends, those of
    # frozen ones as long as the backward of their layer needs them.
    copies = 2.0 * (largest if setup.lora_r and setup.checkpointing else linear)
    return weights + copies, weights


def _optimizer_bytes(optim: str) -> float:
    near = [name for name in _OPTIMIZER_BYTES if optim.startswith(name)]
    return _OPTIMIZER_BYTES[max(near, key=len)] if near else 8.0  # two float32 states
