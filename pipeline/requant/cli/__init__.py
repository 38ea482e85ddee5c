"""CLI: argv, printing, exit codes. Heavy imports are inside the commands.

    main              the commands of a recipe   <- start here
    init_command      init: a starter recipe, printed or in a new file
    check_command     check
    sweep_command     sweep: a run for each combination of values, then their comparison
    text_view         documents as the model will see them, what is scored marked
    report_commands   gate, compare: commands that need finished reports only
    deploy_commands   verify, push
    convert_command   convert
    run_paths         a run's directory in place of a recipe, a report or a checkpoint
    last_lines        a finished run's report, where it and the checkpoint are, the next command
    exit_codes        what each exit code means, for the help texts
    outputs           files that a command line asks for, the standard streams
    console           progress on a terminal, plain lines elsewhere
    wrapping          text broken between words only
    foreign_output    output of libraries, kept apart from ours

May import: errors, recipe, runtime, checkpoint, heal, deploy, run; requant_eval.gate, .report, .render, .whole_files.
"""

from requant.cli.main import app, main

__all__ = ["app", "main"]
