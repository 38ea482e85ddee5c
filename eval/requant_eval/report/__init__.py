"""Report: estimates and facts in, report.json out.

    assemble        build(sets=..., facts=...): the report as a dict   <- start here
    records         the parts of the report, as its schema has them
    schema          its JSON Schema, and loading reports of older versions
    verdict         gates against the numbers
    recommend       which of three ways to deploy
    headline        the one sentence
    roads           what ships beside what people would otherwise ship
    adapter_gain    what the adapter gained over its base, where that is nothing
    compare         two runs, paired by document
    compare_tasks   the same of the tasks of lm-evaluation-harness
    compare_roads   their roads on a shared set
    number_format   digits that an interval allows

May import: errors, gate, metrics, whole_files.
"""

from requant_eval.report.assemble import build
from requant_eval.report.schema import load

__all__ = ["build", "load"]
