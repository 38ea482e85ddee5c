"""Campaigns: what a bad disk, input, moment or neighbour can do, at random and counted.

    test_fuzz        mutated inputs, one command each                            <- start here
    test_kill        SIGKILL at random moments, then resumed
    test_signals     SIGINT, SIGTERM, SIGHUP, then resumed
    test_disk        no space left from the n-th byte on, then resumed
    test_power       what a power loss leaves of unsynced writes, then resumed
    test_ranks       one of two gloo ranks killed
    test_harness     the campaigns' own parts: they find what they are made to find
    workshop         the project, its finished run, and the command line run in a forked process
    fork_server      a process that has imported everything, and forks one command after the other
    syscall_layer    writes, syncs and renames of a command, seen and refused one by one (seccomp)
    crash_states     what may be on the disk after a power loss
    interruptions    a run killed or signalled, and resumed
    fuzzing          mutated inputs: drawn, run, judged, kept
    verdicts         what ended well, and the root cause of what did not
    judges           outside readers: what a server or the format's own library makes of the same files
    mutations        bytes, JSON and YAML, changed at random
    tensor_mutations safetensors files, changed at random
    cases            one mutated input: its files, the command that reads it, who judges
    model_cases      bases, adapters, checkpoints, their configs and tokenizers
    text_cases       recipes, texts, chat templates
    run_cases        reports, scores, states of a finished run
    same_run         a run directory compared with the undisturbed one

All is drawn from a seed: `pytest tests/campaigns --campaign-seed 7 --campaign-size 200`. What fails is kept and printed with
the command that repeats it. `make campaign` runs the whole.
"""
