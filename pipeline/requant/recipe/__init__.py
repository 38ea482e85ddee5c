"""Recipe: what the user asked for, as strict sections with readable errors.

    schema               the whole recipe: load, parse, JSON Schema   <- start here
    combinations         the recipes of a sweep, one for each choice of values
    copies               the recipe as YAML again, for a run and for a report
    fields               field types and checks that sections share
    model_sections       base, adapter, merge
    quantize_section     quantize
    output_section       output
    text_sections        calibration, evaluation sets and other text
    heal_section         heal
    answers_section      evaluate.answers
    task_section         evaluate.tasks
    gates_section        gates
    named_files          text files that do not exist, with line, key and nearest name
    yaml_document        YAML with line numbers, duplicate keys refused
    yaml_nodes           YAML text within limits
    override_values      overrides: keys and values of --set, plain data of a Python caller
    error_messages       validation errors as file:line: key: what to do
    source_directories   what a directory is that was given as an adapter or a model
    adapter_record       what an adapter's files say of its base
    section_examples     examples of every section, for editors and docs/recipe.md
    reference            docs/recipe.md, written from the schema
    template             a commented recipe for an adapter (`requant init`)

Imports neither torch nor transformers. May import: errors; requant_eval.gate.
"""

from requant.recipe.copies import dump, public
from requant.recipe.schema import Recipe, json_schema, load, parse

__all__ = ["Recipe", "dump", "json_schema", "load", "parse", "public"]
