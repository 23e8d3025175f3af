"""pytest plugin of the interpreted run: strict interpreter, launchers behind the CPU dispatch key.

Load it with `-p tests.kernels.interpreted.plugin` and TRITON_INTERPRET=1, in a process of its own.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("the interpreted tests need TRITON_INTERPRET=1; run tests/kernels instead")
os.environ["ORPO_KERNELS_CPU_BACKEND"] = "torch"  # the CPU dispatch key is ours here

import torch

from orpo_kernels import kernels, odds_ratio, pair_loss, sequence_mean
from orpo_kernels.engine import linear_lse
from orpo_kernels.engine.tiles import plain
from orpo_kernels.kernels import start, tuning
from tests.kernels.interpreted import strict

launches: list[str] = []  # names of the kernels launched so far
programs: list[tuple[str, int]] = []  # those started by the loops of a GPU, with their programs


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="2/3: of every three tests the second")


def pytest_collection_modifyitems(config, items):
    part, count = map(int, config.getoption("--part").split("/"))
    items[:] = items[part - 1 :: count]


def pytest_configure():
    strict.install()
    # Three processors: rows are split at these sizes, and the programs stay few.
    tuning.device_info = lambda device: tuning.Device("datacenter", 3)
    real = tuning.launch

    def counted(kernel, *rest):
        launches.append(kernel)
        return real(kernel, *rest)

    for module in (
        "softmax_stats", "softmax_grad", "column_sums", "linear_lse", "sequence_mean", "odds_ratio",
        "pair_loss",
    ):  # fmt: skip
        __import__(f"orpo_kernels.kernels.{module}")
        getattr(kernels, module).launch = counted
    started = start.Start.__call__

    def counted_start(self, count, *numbers):
        name = self.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        launches.append(name)
        programs.append((name, count))
        started(self, count, *numbers)

    start.Start.__call__ = counted_start
    kernels.DEVICES = ("cpu",)
    for name in ("softmax_stats", "softmax_grad_", "column_sums"):
        kernels.register_tile_operation(name, getattr(plain, name))
    kernels.register_tile_operation("linear_lse", linear_lse._linear_lse)
    kernels.register_custom_op("sequence_mean", sequence_mean._sequence_mean)
    kernels.register_custom_op("sequence_mean_backward", sequence_mean._sequence_mean_backward)
    kernels.register_custom_op("pair_loss", pair_loss._pair_loss)
    kernels.register_custom_op("odds_ratio", odds_ratio._odds_ratio)
    kernels.register_custom_op("odds_ratio_backward", odds_ratio._odds_ratio_backward)
    torch.set_num_threads(1)
