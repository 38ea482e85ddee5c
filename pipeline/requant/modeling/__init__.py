"""Modeling: a causal LM's structure on meta tensors, and running it block by block.

    skeleton             the modules transformers would build, without weights   <- start here
    linears              every matrix as a Linear: Conv1D transposed, experts split
    moe                  mixture-of-experts layers as one Linear a projection and expert
    stacked_experts      where stacked expert parameters are stored
    block_walk           one block loaded, run on all batches, released
    sequential           all batches of a block to one group of linears, before any goes on
    hidden_state_store   hidden states between blocks, on the device or the host
    fused_ops            norms, rotary embeddings and gates as one kernel each

May import: errors, runtime, numerics, checkpoint.
"""
