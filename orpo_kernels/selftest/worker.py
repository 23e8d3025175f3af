"""A process that checks what it is told to: `python -m orpo_kernels.selftest.worker DEVICE MODEL`.

A line in, `[op, configuration, dtype]`; a line out, the `Check` as a JSON object. MODEL is 1 where
the cases of a Hugging Face model are among them.
"""

import json
import os
import sys
from dataclasses import asdict

import torch

from orpo_kernels.selftest.cases import all_cases
from orpo_kernels.selftest.checking import checked, labels_of


def main() -> None:
    """Answers until its input ends."""
    device, with_model = torch.device(sys.argv[1]), sys.argv[2] == "1"
    # What libraries print goes to the errors: the answers stand alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    known = {labels_of(case): case for case in all_cases(device, 1, with_model=with_model)}
    for line in sys.stdin:
        op, name, dtype = json.loads(line)
        answers.write(json.dumps(asdict(checked(known[op, name, dtype]))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
