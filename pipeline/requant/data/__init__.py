"""Text from files and the hub as token documents and packed windows.

    documents   rows of text, chat or prompt and completion as token ids   <- start here
    packing     windows for calibration and for healing
    overlap     how much evaluation text also occurs in calibration text
    canaries    prompts whose answers the report shows

May import: errors, checkpoint; requant_eval.scoring.
"""
