"""Render: report.json as Markdown, HTML, terminal, model card, CI.

    document                                                    what a report says, in order, for every medium   <- start here
    markdown, html, terminal, ci                                the media
    model_card                                                  README.md of a checkpoint
    tables                                                      what a table is, and those of the whole report
    set_tables                                                  tables of one evaluation set
    adapter_tables, heal_tables, engine_table, compare_tables   tables of one subject each
    charts, svg                                                 pictures

May import: errors, gate, metrics, report.
"""
