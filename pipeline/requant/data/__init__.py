"""Data: text from files and the hub, as token documents and windows.

    documents   rows of text, chat or prompt and completion as token ids   <- start here
    packing     windows of calibration and healing text
    overlap     evaluation text that also occurs in calibration text
    canaries    prompts whose answers are shown in the report

May import: errors, checkpoint; requant_eval.scoring.
"""
