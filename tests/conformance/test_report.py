"""What people and programs are told."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

from lb.conformance.judgement import CHECKS, Finding, Status
from lb.conformance.observed import MoveRecord, Observations, Origin, SeenCid
from lb.conformance.report import Report, as_json, as_junit, as_text, judged, unreachable
from tests.conformance import servers

SUBJECT = servers.subject()
CID = SUBJECT.craft(os.urandom)
WRONG = b"\xf0" + CID[1:]


def report(*cids: bytes, error: str | None = None) -> Report:
    seen = Observations([SeenCid(cid, Origin.HANDSHAKE, i) for i, cid in enumerate(cids)], handshakes=len(cids))
    seen.rebinding = MoveRecord(error=error) if error else None
    return Report("192.0.2.1:443", SUBJECT, judged(SUBJECT, seen), began=0.0, seconds=1.25)


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 - our own


def test_a_program_is_told_what_the_documentation_says() -> None:
    done = report(CID, WRONG)
    value = json.loads(as_json(done))
    assert {name: value[name] for name in value if name not in ("checks", "counts")} == {
        "format": 1,
        "target": "192.0.2.1:443",
        "fit": False,
        "began": "1970-01-01T00:00:00Z",
        "seconds": 1.25,
        "server": {
            "name": "a",
            "server_id": "c0ffee01",
            "config_id": 0,
            "algorithm": "single-pass",
            "cid_length": 17,
        },
    }
    assert [check["name"] for check in value["checks"]] == [check.name for check in CHECKS]
    assert value["counts"] == {str(status): done.count(status) for status in Status}
    assert sum(value["counts"].values()) == len(CHECKS)
    for check in value["checks"]:
        kinds = {name: type(field) for name, field in check.items()}
        assert kinds == {"name": str, "title": str, "status": str, "detail": str, "evidence": list, "numbers": dict}
    assert value["checks"][1] == {
        "name": "routable",
        "title": "every CID carries this server's ID",
        "status": "failed",
        "detail": "1 of 2 CIDs are not routable to this server",
        "evidence": [f"{WRONG.hex()} (Initial of connection 1): config ID 7: marked as unroutable (0b111)"],
        "numbers": {"cids": 2, "misrouted": 1},
    }


def test_junit_has_a_case_for_each_check_and_counts_them() -> None:
    done = report(CID, WRONG)
    root = parsed(as_junit(done))
    [suite] = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [check.name for check in CHECKS]
    assert all(case.get("classname") == "quiclb.conformance" for case in cases)
    outcomes = Counter(
        "failed" if c.find("failure") is not None else "skipped" if c.find("skipped") is not None else "passed"
        for c in cases
    )
    assert outcomes == {str(status): done.count(status) for status in Status}
    for element in (root, suite):
        assert element.get("tests") == str(len(CHECKS))
        assert element.get("failures") == str(done.count(Status.FAILED))
        assert element.get("errors") == "0"
    assert suite.get("skipped") == str(done.count(Status.SKIPPED))
    assert suite.get("timestamp") == "1970-01-01T00:00:00"
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.get("message") == "1 of 2 CIDs are not routable to this server"
    assert WRONG.hex() in (failure.text or "")


def test_what_a_server_says_moves_no_cursor_and_breaks_no_xml() -> None:
    done = report(CID, error="closed: \x1b[2J\x00\uffff<&>\r\n]]>")
    text = as_text(done)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "closed: \ufffd[2J\ufffd\ufffd<&>\ufffd\ufffd]]>" in text
    [failure] = parsed(as_junit(done)).iterfind(".//testcase[@name='nat-rebinding']/failure")
    assert (failure.get("message") or "").startswith("closed: \ufffd[2J")


def test_people_read_a_verdict_and_the_evidence() -> None:
    lines = as_text(report(CID, WRONG)).splitlines()
    assert lines[0] == "192.0.2.1:443: a, server ID c0ffee01, config ID 0, single-pass, 17 octets"
    assert lines[2] == "FAILED   routable             1 of 2 CIDs are not routable to this server"
    assert lines[3].strip() == f"{WRONG.hex()} (Initial of connection 1): config ID 7: marked as unroutable (0b111)"
    assert lines[-1].startswith("not fit to stand behind a QUIC-LB balancer: ")
    assert lines[-1].endswith(" skipped, in 1.2 s")


def test_a_server_is_fit_if_nothing_failed() -> None:
    fine = [(check, Finding(Status.PASSED, "")) for check in CHECKS]
    done = replace(report(CID), findings=fine)
    assert done.is_fit
    assert as_text(done).splitlines()[-1].startswith(f"fit to stand behind a QUIC-LB balancer: {len(CHECKS)} passed")


def test_a_server_that_is_not_there_failed_one_check() -> None:
    findings = unreachable("192.0.2.1:443: no handshake within 5 s")
    assert [finding.status for _, finding in findings] == [Status.FAILED] + [Status.SKIPPED] * (len(CHECKS) - 1)
