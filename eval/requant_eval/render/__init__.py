"""Render: report.json as Markdown, HTML, terminal, model card, CI.

    document                                                    the report as sections and blocks   <- start here
    markdown, html, terminal, ci                                the formats
    model_card                                                  README.md of a checkpoint
    first_screen, answer_cards, glossary                        plain sentences, answers side by side, words explained
    tables                                                      what a table is, and those of the whole report
    set_tables                                                  tables of one evaluation set
    task_tables                                                 scores of lm-evaluation-harness's tasks
    road_tables                                                 what ships against what people would otherwise ship
    adapter_tables, heal_tables, engine_table, compare_tables, format_table   tables of one subject each
    input_tables                                                base, adapters, their match, the loss on their own text
    charts, module_maps, road_chart                             figures
    chart, svg                                                  what a chart is, and its marks, scales and axes as SVG

May import: errors, gate, metrics, report.
"""
