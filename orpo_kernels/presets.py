"""What the stacks in use call the ORPO loss: they differ in the NLL."""

from typing import NamedTuple

NLL_REDUCTIONS = ("token", "pair")
NLL_SCOPES = ("prompt+completion", "completion")


class Preset(NamedTuple):
    """Which tokens of the chosen sequence the NLL of a stack scores, and how it averages them."""

    nll_scope: str
    nll_reduction: str


PRESETS = {
    "trl": Preset("prompt+completion", "token"),
    "llamafactory": Preset("completion", "pair"),
    "xfactlab": Preset("prompt+completion", "token"),
}
