"""Metrics: scores in, estimates with intervals out.

    set_metrics      one evaluation set's section of the report   <- start here
    definitions      how each metric is computed: a new one is an entry here and in gate.METRICS
    statistics       document-clustered means, paired differences, intervals
    loss_by_change   loss of tokens by how much they changed
    engine_step      what an engine scores against our own forward
    answer_checks    checks of one answer that need no judge: ended, thought closed, tool call, script, language, loop
    languages        the language of a text by its commonest words
    answers          answers of variants to the same prompts: checks passed, where they differ
    answer_records   its section, as the report's schema has it
    task_metrics     one task's section: scores, paired differences, McNemar's test
    task_records     its parts, as the report's schema has them
    proportions      intervals of accuracies and of their differences
    facts            what the report reads of a run's facts
    lookup           a metric's estimate in a set's section
    records          the parts of a set's section, as the report's schema has them

May import: errors, scoring.
"""
