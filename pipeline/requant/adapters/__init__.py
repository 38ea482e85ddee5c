"""Adapters: a PEFT directory as exact changes of weights.

    peft_directory                     load(path): config and tensors, every tensor accounted for   <- start here
    kinds                              peft_type -> how its tensors become a fold
    fold                               what every kind has: the weight it changes, how, within which bound
    keys                               tensor names as PEFT releases and training tools wrote them
    lora, loha, lokr, vera, ia3, oft   one file a kind: its formula and its tensors
    trained_tokens                     rows of an embedding that were trained
    stacked_lora, expert_layouts       LoRA on stacked experts, and which layout PEFT wrote
    unsupported                        what cannot be merged exactly, and why

May import: errors, checkpoint, modeling (types of stacked_experts only).
"""

from requant.adapters.peft_directory import Adapter, load

__all__ = ["Adapter", "load"]
