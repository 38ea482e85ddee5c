"""CLI: argv, printing, exit codes. Heavy imports are inside the commands.

    main              the commands of a recipe   <- start here
    init_command      init: a starter recipe, printed or in a new file
    report_commands   gate, compare: commands that need finished reports only
    deploy_commands   verify, push
    exit_codes        what each exit code means, for the help texts
    console           progress bars on a terminal, plain lines elsewhere

May import: errors, recipe, runtime, checkpoint, heal, deploy, run; requant_eval.gate, .report, .render.
"""

from requant.cli.main import main

__all__ = ["main"]
