"""Modeling: a causal LM's structure on meta tensors, and running it block by block.

    skeleton             the modules transformers would build, without weights   <- start here
    without_weights      model classes instantiated without the memory of their parameters
    model_classes        the class of transformers that a checkpoint belongs to, and loading it
    rotary_functions     rotary tables of a model class, whatever other packages registered
    blocks               the transformer blocks and their linears
    linears              every matrix as a Linear: Conv1D transposed, experts split
    token_ends           token embeddings and head, and the bits that are asked of them
    embedding_rows       refuses texts with tokens that the model has no embedding for
    conversions          transformers' renamings and conversions of a checkpoint's tensors
    cut_linears          Linears that a checkpoint holds as one matrix, and the class as several
    stored_parameters    parameters that a file holds transposed, several in one, or gate and up row by row
    joined_parts         convolutions that a checkpoint holds in parts
    config_limits        sizes in config.json that the weights do not explain
    layer_configs        configs of single layers, where those of a model differ
    families             what structure does not tell of a model family: one entry each
    unplaced             stored tensors that are no parameter: buffers, prediction heads, spare layers
    moe                  mixture-of-experts layers as one Linear a projection and expert
    stacked_experts      where stacked expert parameters are stored
    block_walk           one block loaded, run on all batches, released
    linear_groups        the linears of a block that share an input
    sequential           all batches of a block to one group of linears, before any continues
    paused_batches       the same with every forward run once, paused at each group
    hidden_state_store   hidden states between blocks, on the device or the host
    fused_ops            norms, rotary embeddings and gates as one kernel each

May import: errors, runtime, numerics, checkpoint.
"""
