"""The JSON Schema: it is what the table of keys says, and it agrees with the reader wherever a schema can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lb import config, server_config
from lb.document import Document
from lb.kinds import Duration, Fraction, Integer, Size
from lb.schema import Kind, Reading
from tests.files import EXAMPLES
from tests.test_config import GOOD, MISTAKES, XDP, XDP_MISTAKES, edited

# What a schema cannot see: files, comparisons of two places, and what is lost once YAML is values.
NOT_FOR_A_SCHEMA = {
    "key given twice", "key given twice inside", "key that is a list", "merge key", "alias", "tag", "python tag",
    "octal", "hexadecimal", "underscore", "float", "a very long integer", "yes", "capital true",
    "seed that does not print", "name that is a date", "port 0", "IPv6 without brackets", "endless address",
    "sum over 19", "CID over 20", "weights", "hold-off", "new-flow-timeout",
    "duration too long", "duration of a lifetime", "jitter too large", "config ID twice",
    "interface of the udp engine", "forward mode of the udp engine", "section of the udp engine",
    "interface missing", "workers with xdp", "source with a port", "sources of one family", "source in disguise",
    "source that is everybody", "source that is a group", "nat-ports backwards", "nat-ports too high", "constant-time",
    "metrics on an admin address", "admin twice", "admin for everybody", "socket path too long", "short token",
    "token for everybody", "token that is not there", "certificate without key", "key without certificate",
    "client CA without certificate", "writers without client CA", "back-off to less", "status backwards",
    "CA file that is not there", "CA file without a certificate",
    "CA file that is a pipe",
}  # fmt: skip
COMPARES_OR_READS = (
    "key file", "reset key", "service name", "backend", "server ID twice", "server ID of the wrong",
    "server IDs of no", "listener", "wildcard", "address after",
)  # fmt: skip
NOT_FOR_A_SCHEMA |= {name for name in MISTAKES | XDP_MISTAKES if name.startswith(COMPARES_OR_READS)}


def as_json(value: Any) -> Any:
    """YAML's values as an editor sees them: keys are texts."""
    if isinstance(value, dict):
        return {str(name): as_json(inner) for name, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(config.schema()))


def test_the_shipped_schema_is_the_generated_one() -> None:
    """If this fails: `quiclb schema > config/quiclb.schema.json`."""
    assert (EXAMPLES / "quiclb.schema.json").read_text() == config.schema()


def test_the_module_prints_the_schema() -> None:
    done = subprocess.run([sys.executable, "-m", "lb.schema"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == config.schema()


@pytest.mark.parametrize("schema", [config.schema(), server_config.schema()], ids=["balancer", "server"])
def test_the_schemas_are_of_draft_2020_12(schema: str) -> None:
    parsed = json.loads(schema)
    assert parsed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(parsed)


@pytest.mark.parametrize("name", ["minimal.yaml", "quiclb.yaml", "two-services.yaml", "xdp.yaml"])
def test_the_schema_accepts_the_examples(validator: jsonschema.Draft202012Validator, name: str) -> None:
    validator.validate(as_json(yaml.safe_load((EXAMPLES / name).read_text())))


def test_the_schema_accepts_the_example_of_a_server() -> None:
    schema = json.loads(server_config.schema())
    jsonschema.validate(as_json(yaml.safe_load((EXAMPLES / "server.yaml").read_text())), schema)


@pytest.mark.parametrize("name", [name for name in MISTAKES | XDP_MISTAKES if name not in NOT_FOR_A_SCHEMA])
def test_the_schema_refuses_what_the_reader_refuses(validator: jsonschema.Draft202012Validator, name: str) -> None:
    (old, new, _, _), text = (MISTAKES[name], GOOD) if name in MISTAKES else (XDP_MISTAKES[name], XDP)
    assert not validator.is_valid(as_json(yaml.safe_load(edited(old, new, text))))


@pytest.mark.parametrize("text", [GOOD, XDP])
def test_the_schema_accepts_the_files_that_the_mistakes_are_made_in(
    validator: jsonschema.Draft202012Validator, text: str
) -> None:
    validator.validate(as_json(yaml.safe_load(text)))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Duration(0, 86_400), 0.0, "0s"),
        (Duration(0, 86_400), 0.02, "20ms"),
        (Duration(0, 86_400), 1.0, "1s"),
        (Duration(0, 86_400), 1.5, "1500ms"),
        (Duration(0, 86_400), 90.0, "90s"),
        (Duration(0, 86_400), 120.0, "2m"),
        (Duration(0, 86_400), 86_400.0, "24h"),
        (Duration(0, 86_400), 0.00025, "0.25ms"),
        (Size(0, 1 << 40), 1000, "1000B"),
        (Size(0, 1 << 40), 4 << 20, "4MiB"),
        (Fraction(0, 1), 0.1, "10%"),
        (Fraction(0, 1), 0.125, "12.5%"),
        (Integer(0, 9), 7, 7),
    ],
)
def test_values_are_written_as_they_are_read(kind: Kind, value: object, text: object, tmp_path: Path) -> None:
    path = tmp_path / "value.yaml"
    path.write_text(f"{text}\n")
    document = Document(path)
    assert kind.to_json(value) == text
    assert kind.read(document.root, "", Reading(document)) == value
