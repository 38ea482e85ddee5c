"""Check: what a run will take and cost, before it starts.

    forecast           seconds and memory of every stage   <- start here
    forecast_merge     the same of the merge
    forecast_formats   the same of each format beside GPTQ
    forecast_asking    the same of prompts, tasks, roads and the probe of merge.onto: auto
    rehearsal          one block of random weights run, quantized, scored and timed
    input_widths       widths, which a group size must divide, and positions, which windows must fit
    held_out           whether evaluation sets have enough documents
    sample_texts       the first documents of every text as the model will see them
    delta_prediction   how much of the adapter's delta the grid will keep

Part of package run: may import what that may.
"""
