"""The exact loops of devices that run Triton's kernels: few launches, in memory taken once a call.

`shapes`, `model` and `plan` are arithmetic and import neither a tensor nor triton; `forward`,
`folded` and `backward` import the kernels, and are imported when the first call needs them.
"""
