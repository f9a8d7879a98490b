"""What is told to people (text) and programs (JSON, JUnit XML). docs/conformance.md has the shapes.

CIDs are told, keys and tokens never.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

from lb.conformance.judgement import CHECKS, Check, Finding, Status
from lb.conformance.observed import Observations
from lb.conformance.subject import Subject

FORMAT = 1  # of the JSON: names are added to it, and none is taken away or means something else


@dataclass(frozen=True, slots=True)
class Report:
    """One examination: `target` is what was asked for, `began` Unix time, `seconds` how long it took."""

    target: str
    subject: Subject
    findings: Sequence[tuple[Check, Finding]]
    began: float
    seconds: float

    @property
    def is_fit(self) -> bool:
        return not self.count(Status.FAILED)

    def count(self, status: Status) -> int:
        return Counter(finding.status for _, finding in self.findings)[status]


def judged(subject: Subject, seen: Observations) -> list[tuple[Check, Finding]]:
    """Each check, in its order, and what it found."""
    return [(check, check.judge(subject, seen)) for check in CHECKS]


def unreachable(reason: str) -> list[tuple[Check, Finding]]:
    """The same for a server that no connection could be made to."""
    first, *others = CHECKS
    skipped = Finding(Status.SKIPPED, "no connection could be made")
    return [(first, Finding(Status.FAILED, reason)), *((check, skipped) for check in others)]


def as_text(report: Report) -> str:
    """Lines for people: one for each check, and evidence below those that failed."""
    config = report.subject.config
    lines = [
        f"{report.target}: {report.subject.name}, server ID {report.subject.server_id.hex()}, "
        f"config ID {config.config_id}, {config.algorithm}, {config.cid_length} octets"
    ]
    width = max(len(check.name) for check, _ in report.findings)
    for check, finding in report.findings:
        status = finding.status.upper() if finding.status is Status.FAILED else finding.status
        lines.append(f"{status:<7}  {check.name:<{width}}  {finding.detail}")
        lines += [f"{'':<7}  {'':<{width}}    {line}" for line in finding.evidence]
    counts = ", ".join(f"{report.count(status)} {status}" for status in Status)
    verdict = "fit" if report.is_fit else "not fit"
    lines.append(f"{verdict} to stand behind a QUIC-LB balancer: {counts}, in {report.seconds:.1f} s")
    return "\n".join(map(plain, lines)) + "\n"


def as_json(report: Report) -> str:
    """One object, in one line."""
    config = report.subject.config
    value: dict[str, Any] = {
        "format": FORMAT,
        "target": report.target,
        "fit": report.is_fit,
        "began": _moment(report.began),
        "seconds": round(report.seconds, 3),
        "server": {
            "name": report.subject.name,
            "server_id": report.subject.server_id.hex(),
            "config_id": config.config_id,
            "algorithm": config.algorithm,
            "cid_length": config.cid_length,
        },
        "counts": {str(status): report.count(status) for status in Status},
        "checks": [
            {
                "name": check.name,
                "title": check.title,
                "status": str(finding.status),
                "detail": finding.detail,
                "evidence": list(finding.evidence),
                "numbers": dict(finding.numbers),
            }
            for check, finding in report.findings
        ],
    }
    return json.dumps(value) + "\n"


def as_junit(report: Report) -> str:
    """A JUnit test suite with a case for each check."""
    counts = {
        "tests": str(len(report.findings)),
        "failures": str(report.count(Status.FAILED)),
        "errors": "0",
        "skipped": str(report.count(Status.SKIPPED)),
        "time": f"{report.seconds:.3f}",
    }
    # Jenkins' schema has no number of skipped ones here.
    totals = {name: value for name, value in counts.items() if name != "skipped"}
    root = ElementTree.Element("testsuites", {"name": "quiclb conformance"} | totals)
    # Without an offset, as the schemas want it: UTC.
    began = _moment(report.began).removesuffix("Z")
    name = _xml(f"quiclb conformance {report.target}")
    whose = {"name": name, "timestamp": began, "hostname": _xml(report.target)}
    suite = ElementTree.SubElement(root, "testsuite", whose | counts)
    for check, finding in report.findings:
        case = ElementTree.SubElement(suite, "testcase", name=check.name, classname="quiclb.conformance", time="0")
        if finding.status is Status.FAILED:
            failure = ElementTree.SubElement(case, "failure", message=_xml(finding.detail), type="nonconformance")
            failure.text = _xml("\n".join((check.title, *finding.evidence)))
        elif finding.status is Status.SKIPPED:
            ElementTree.SubElement(case, "skipped", message=_xml(finding.detail))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(finding.detail)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _moment(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(line: str) -> str:
    """Without what could move a terminal's cursor: servers say why they close connections."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def _xml(text: str) -> str:
    """Without what XML has no way to write."""
    return "\n".join(map(plain, text.split("\n")))
