"""What the stacks in use call the ORPO loss: they differ in the tokens they score, and in the NLL.

Scopes are matters of the labels. Two are known to the loss itself, `NLL_SCOPES`: it can tell by the
batch. Those with "pad" are made by the collator; they are what xfactlab's code does, which pads
with EOS and takes the two for one: its NLL leaves out every EOS, the real ones too, and its odds
score one padding position after each answer.
"""

from typing import NamedTuple

NLL_REDUCTIONS = ("token", "pair")
NLL_SCOPES = ("prompt+completion", "completion")
LABEL_NLL_SCOPES = (*NLL_SCOPES, "prompt+completion-pad")
ODDS_SCOPES = ("completion", "completion+pad")


class Preset(NamedTuple):
    """Which tokens a stack's NLL scores, how it averages them, and which its odds score."""

    nll_scope: str
    nll_reduction: str
    odds_scope: str = "completion"


PRESETS = {
    "trl": Preset("prompt+completion", "token"),
    "llamafactory": Preset("completion", "pair"),
    "xfactlab": Preset("prompt+completion-pad", "token", "completion+pad"),
    "paper": Preset("prompt+completion", "token"),
}
