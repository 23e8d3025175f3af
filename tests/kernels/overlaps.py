"""Memory that a program reads and writes with no `tl.debug_barrier()` between, and is right to.

The strict interpreter and the compile report refuse all other. A reduction's barrier is none: it is
there in some layouts only, and on AMD it does not order global memory.
"""

BY_ELEMENT = {
    "_add_further_kernel": ("sums_ptr",),
    "_column_totals_kernel": ("totals_ptr",),
    "_dense_rows_kernel": ("sums_ptr",),
    "_gather_slots_kernel": ("sums_ptr",),
    "_live_columns_kernel": ("entries_ptr",),
    "_pack_slots_kernel": ("mass_ptr", "slots_ptr", "tail_ptr"),
    "_reach_kernel": ("bounds_ptr",),
    "_scale_rows_kernel": ("g_ptr", "g_r_ptr"),
    "_softmax_block_kernel": ("accumulator_ptr",),
    "_softmax_grad_kernel": ("logits_ptr", "out_ptr"),
    "_softmax_rows_kernel": ("logits_ptr", "probs_ptr"),
}
"""What is written over an element is made of it, and the element has the same place in both blocks.

The thread that writes has read the element itself, or was handed it by a conversion of layouts,
which waits for all that read. Warps may hold copies of an element (a scalar, fewer elements than
threads) and read late: what they make of it is then only what another warp writes.
"""

APART = {
    "_keep_slots_kernel": ("used_ptr",),  # one half is read, the other written
    "_pack_slots_kernel": ("addresses_ptr",),  # those of earlier blocks are read, new ones written
}
"""No byte that a launch reads is written by it."""
