"""Stage: load every variant as a model and score it on every set.

    stage             evaluate(scores, sources, ...)   <- start here
    scores            the files of scores and canary answers
    variants          base, adapter, merged, rtn, gptq, healed, ends, original as models
    variant_sources   where they are made from: directories and plans
    trained_base      base and adapter as training held them, by bitsandbytes and PEFT
    roads             what people ship otherwise, by the libraries that they use for it
    variant_weights   the weights of a variant, computed when they are read
    streamed          a variant run block by block, for models that do not fit on the device
    memory            the memory that a variant takes when it is scored whole
    over_ranks        evaluation with the windows shared by several ranks
    peft_runtime      the adapter applied by PEFT, as in training
    finite_forward    where a checkpoint first gives NaN in the dtype that it ships in
    task_stage        tasks of lm-evaluation-harness on every variant: run_tasks(scores, sources, ...)
    tasks             the tasks of a run: built, checked against template and window
    task_definitions   tasks found by name or built from a file, in the library
    task_documents    the document that the library works on, for errors; nulls that it would write
    task_files        task files (YAML) read without running code
    generation_settings   how a task lets a model answer: greedy, with an end
    task_values       metrics of a task, and the value of each document
    task_model        a variant as a model of the library
    adapter_probe     whether the adapter lowers the loss on calibration text
    merge_onto_probe   held-out loss of merges onto two bases
    width_losses       loss of the merged model when one unit of linears is quantized to each width
    unit_solver        the weights of that unit as GPTQ leaves them
    planned_merge      a merge that is not written, as a model
    expert_order_probe   in which of two orders the experts of an adapter lower it

May import: errors, runtime, numerics, checkpoint, formats, data, modeling, adapters, merge; requant_eval.scoring.
"""

from requant.evaluate.stage import evaluate

__all__ = ["evaluate"]
