"""Text from files and the hub as token documents and packed windows.

    documents         rows of text, chat or prompt and completion as token ids   <- start here
    row_files         rows of txt, jsonl, json, csv, parquet files and hub datasets
    text_files        bytes of a data file within limits
    long_texts        token ids of a long text, part by part
    stored_tokens     token documents on the disk, known by the digest of all that they depend on
    columns           which columns hold the text; no other text is left out
    conversation      a row's messages and tools as chat templates take them
    chat_template     messages -> text by the tokenizer's template, and where the answers are
    template_call     one call of a template, with content as it takes it
    template_losses   what a template leaves out, found by marks
    tokenizer         loads the tokenizer that is shipped
    packing           windows for calibration, shares of sources
    healing_text      windows for healing: to train on, to choose and to judge a step by
    duplicates        documents that are the same text, or nearly
    overlap           how much evaluation text also occurs in calibration text
    canaries          prompts whose answers the report shows
    prompts           prompts of held-out rows, with the turn of an answer opened

May import: errors, runtime, checkpoint; requant_eval.scoring.
"""

from requant.data.documents import TextSource, TokenDocument, adds_bos, tokenize

__all__ = ["TextSource", "TokenDocument", "adds_bos", "tokenize"]
