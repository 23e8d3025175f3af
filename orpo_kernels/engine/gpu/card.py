"""What the time of a call depends on besides its sizes: a few figures of the device."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """Figures of a device, as GEMMs and row kernels see it under load.

    Attributes:
        processors: of the device.
        flops: of 16-bit GEMMs that sum in float32, per second.
        bandwidth: bytes per second.
        capability: NVIDIA's compute capability, 90 for 9.0; 0 elsewhere.
        launch_s: of the host, per launch: 1e-5 on a fast one, 2.6e-5 on that of an H200.
        gap_s: between a kernel and the next one, which waits for it.
    """

    processors: int
    flops: float
    bandwidth: float
    capability: int = 0
    launch_s: float = 2.5e-5
    gap_s: float = 2e-6


# A mid-range card of 2023, for a plan on a machine without a card or with one that says little.
_TYPICAL = Card(processors=46, flops=60e12, bandwidth=4.2e11, capability=89)

# Dense 16-bit multiplications and additions summed in float32, per processor and clock.
_FLOP_PER_CLOCK = {70: 1024, 75: 512, 80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
_SUSTAINED = 0.68  # of the peak, under load: 730 TFLOP/s of an H200
_MOVED = 0.83  # of the peak bandwidth: 4.0 TB/s of an H200


@functools.cache
def card_of(device: torch.device) -> Card:
    """The figures of a device, from what its driver says of it."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return _TYPICAL
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    known = max((each for each in _FLOP_PER_CLOCK if each <= capability), default=70)
    per_s = properties.multi_processor_count * 1e3 * properties.clock_rate
    bits = 2e3 * properties.memory_clock_rate * properties.memory_bus_width  # at both edges
    return Card(
        properties.multi_processor_count,
        _SUSTAINED * _FLOP_PER_CLOCK[known] * per_s,
        _MOVED * bits / 8,
        capability,
    )
