"""One check: its figures, whatever the caller has set, or what it raised."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from orpo_kernels.selftest.figures import Case
from orpo_kernels.selftest.report import Check, dtype_name


def checked(case: Case) -> Check:
    """Runs a case; a worst figure, and what is wrong."""
    labels = labels_of(case)
    try:
        with _surroundings(case.setting.device):
            figures = case.run()
    except Exception as error:  # whatever a broken kernel raises is a finding; the rest still runs
        return failed(labels, f"raised {type(error).__name__}: {error}".splitlines()[0])
    worst = max(figures, key=lambda figure: figure.used)
    wrong = [
        f"{each.what} is off by {each.error:.1e}, at most {each.limit:.1e} is right"
        for each in figures
        if not each.passed
    ]
    return Check(*labels, not wrong, worst.what, worst.error, worst.limit, "; ".join(wrong))


def labels_of(case: Case) -> tuple[str, str, str]:
    """Op, configuration and dtype: no two cases have the same."""
    return case.op, case.name, dtype_name(case.setting.dtype)


def failed(labels: tuple[str, str, str], message: str) -> Check:
    """Of a case that came to no figures."""
    return Check(*labels, False, "", float("nan"), 0.0, message)


@contextmanager
def _surroundings(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        # Inputs and truths are made on the CPU, whatever the caller's default device.
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
