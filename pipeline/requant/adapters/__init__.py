"""Adapters: a PEFT directory as exact changes of weights.

    peft_directory                     load(path): config and tensors, every tensor accounted for   <- start here
    kinds                              KINDS, the table of adapter kinds: a new kind is one line here and one file
    lora, loha, lokr, vera, ia3, oft   one file a kind: its formula, its tensors, its settings
    trained_tokens                     rows of an embedding replaced: a kind, and a part of LORA
    stacked_lora, expert_layouts       LoRA on stacked experts, a part of LORA; which parameter a pair changes
    expert_order                       the order of lora_B's columns there: PEFT's, or unsloth's older one
    some_rows                          a change of rows of a stored matrix, which are a module of the class
    fold                               the base class of the formulas, in fp32
    fp64                               fp64 arithmetic and error bounds of the self-test
    module_tensors                     the tensors of one module, and how PEFT spells their keys
    config                             adapter_config.json: rank and scaling of a module
    keys                               tensor names as PEFT releases and training tools write them
    setting_types                      types of the settings in adapter_config.json
    targets                            which modules the settings target, by PEFT's rules
    weight_files                       one safetensors file, or shards with an index
    other_files                        trained weights in further files of the directory
    unsupported                        peft types and settings that are not merged, and why

May import: errors, runtime, checkpoint, modeling (types of stacked_experts only).
"""

from requant.adapters.peft_directory import Adapter, load

__all__ = ["Adapter", "load"]
