"""Runtime: the machine. Devices, pinned memory, several ranks, measurements.

    device            which device, how much of its memory is free, how fast it multiplies
    ranks             communication between the processes that share a model   <- start here for several GPUs
    launch            one command on all ranks that a launcher such as torchrun started
    signals           SIGTERM and SIGHUP as Ctrl-C
    guarded_process   a stranger's program within limits of time and memory
    cuda_graph        work on fixed shapes as one launch
    pinned_memory     page-locked host memory that is used again, and copies through it
    interpreter       thread switch interval and garbage collector while a GPU works
    library_imports   large libraries without the parts of others that no run uses
    measurements      seconds, peak memory and hardware of a stage

May import: errors.
"""
