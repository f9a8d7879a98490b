"""The OpenAPI description: it is one, it is exact, and schemathesis finds nothing that it does not say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lb.admin.api import Api
from lb.admin.openapi import ANSWERS, OPERATIONS, SCHEMAS, document
from lb.keys import AdminConfig
from tests.admin.client import ask
from tests.admin.fake import running

CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "409", "412", "422"]

[parameters]
service = "web"
backend = "b0"
file = "index.html"
"""
EXAMPLES = 25
GOOD = "a-token-to-be-tested-with"


def test_every_operation_is_described_and_every_description_is_served() -> None:
    described = document("1")
    methods = {(method.upper(), path) for path, by_method in described["paths"].items() for method in by_method}
    names = [o["operationId"] for by_method in described["paths"].values() for o in by_method.values()]

    assert methods == {(operation.method, operation.path) for operation in OPERATIONS}
    assert Counter(names).most_common(1)[0][1] == 1
    for name in names:
        assert callable(getattr(Api, f"_{name}"))


def test_every_change_is_one_that_a_reader_may_not_make() -> None:
    """Only explaining is a POST and no change."""
    assert {o.name for o in OPERATIONS if o.method != "GET" and not o.changes} == {"explain"}
    assert not any(o.changes for o in OPERATIONS if o.method == "GET")


def test_it_is_served_as_it_is() -> None:
    with running() as made:
        served = ask(made.address, "GET", "/v1/openapi.json").json

    assert served == json.loads(json.dumps(document(served["info"]["version"])))
    assert served["openapi"] == "3.1.0"
    for name, schema in served["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False, name
    assert set(references(served)) <= {f"#/components/schemas/{name}" for name in served["components"]["schemas"]}


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        inner = [found for one in value.values() for found in references(one)]
        return [*inner, value["$ref"]] if isinstance(value.get("$ref"), str) else inner
    return [found for one in value for found in references(one)] if isinstance(value, list) else []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("state", "/v1/state"),
        ("history", "/v1/history"),
        ("rotation", "/v1/rotation"),
        ("backend", "/v1/services/web/backends/b0"),
    ],
)
def test_answers_have_the_shape_that_is_described(name: str, path: str) -> None:
    with running() as made:
        for _ in range(5):
            made.balancer.tick()
        answer = ask(made.address, "GET", path).json

    schema = {"components": {"schemas": SCHEMAS}, **ANSWERS[name]}
    jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("with_token", [False, True])
def test_schemathesis_finds_nothing(tmp_path: Path, with_token: bool) -> None:
    """Requests of all sorts, right ones and wrong ones; each answer has to be one that the description has.

    With a token, changes have no condition, so that more of them are made; and without it none is answered.
    """
    token = tmp_path / "token"
    token.write_text(GOOD)
    token.chmod(0o600)
    configuration, described = CONFIGURATION, document("1")
    if with_token:
        configuration = f'headers = {{ Authorization = "Bearer {GOOD}" }}\n{CONFIGURATION}If-Match = "*"\n'
        described["security"] = [{"token": []}]
    (tmp_path / "schemathesis.toml").write_text(configuration)
    with running(AdminConfig(write_token_file=token if with_token else None)) as made:
        for _ in range(5):
            made.balancer.tick()
        (tmp_path / "openapi.json").write_text(json.dumps(described))
        command = [
            *(sys.executable, "-m", "schemathesis.cli"),
            *("--config-file", "schemathesis.toml", "run", "openapi.json", "--url", f"http://{made.address}"),
            *("--max-examples", str(EXAMPLES), "--generation-deterministic", "--seed", "1", "--no-color"),
            *("--checks", "all", "--phases", "examples,coverage,fuzzing", "--request-timeout", "20"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
        served = len(made.balancer.changes)

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert served > 0, "nothing was ever changed"
    print(done.stdout[-1500:])
