"""The verdict for CI systems: exit code, JUnit XML and a Markdown summary."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from requant_eval.escaping import markdown, markdown_block
from requant_eval.render.document import readable
from requant_eval.render.tables import gates_table, options_table
from requant_eval.report.records import GateResult, Report

EXIT_CODES = {"pass": 0, "none": 0, "fail": 3, "inconclusive": 4}


def junit(report: Report) -> str:
    """JUnit XML with one test case a gate.

    A failed gate is a failure, an inconclusive one an error.
    """
    report = readable(report)
    gates, name = report["gates"], str(report["name"] or "requant")
    found = [g["status"] for g in gates]
    counts = {"tests": len(gates), "failures": found.count("fail"), "errors": found.count("inconclusive")}
    numbers = {key: str(count) for key, count in counts.items()}
    root = ET.Element("testsuites", numbers)
    suite = ET.SubElement(root, "testsuite", {"name": f"requant {name}"} | numbers)
    for g in gates:
        case = ET.SubElement(suite, "testcase", {"classname": f"{name}.{g['set']}", "name": title(g)})
        if g["status"] == "pass":
            ET.SubElement(case, "system-out").text = g["text"]
            continue
        tag = "failure" if g["status"] == "fail" else "error"
        ET.SubElement(case, tag, {"type": g["status"], "message": g["text"]}).text = report["verdict"]["line"]
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def summary(report: Report) -> str:
    """Verdict, headline, warnings, gates and the ways to deploy in Markdown, for `GITHUB_STEP_SUMMARY`."""
    report = readable(report)
    gates = gates_table(report)
    parts = [f"## {markdown(report['verdict']['line'])}", markdown_block(report["headline"])]
    parts += ["\n".join(f"- {markdown(warning)}" for warning in report["warnings"])] if report["warnings"] else []
    parts += [gates.markdown()] if gates.rows else []
    text = markdown_block(report["recommendation"]["text"])
    return "\n\n".join([*parts, text, options_table(report).markdown()]) + "\n"


def title(gate: GateResult) -> str:
    """A judged gate's rule, without its numbers: the same in every run."""
    whose = f" of {gate['relative_to']}" if gate["relative_to"] else ""
    unit = gate["unit"] if gate["unit"] == "%" else f" {gate['unit']}".rstrip()
    return f"{gate['metric']} {gate['set']} {gate['side']} {gate['limit']:g}{unit}{whose}"
