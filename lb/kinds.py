"""What a single value may be: integers, durations, addresses, names of files and the like.

YAML 1.1 takes some texts for what they are not meant to be. Each kind goes by the text as it was written, and refuses
what YAML and people would read differently.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lb.address import MAX_PORT, Address
from lb.document import Node, Scalar, shown
from lb.schema import INVALID, Kind, Reading, did_you_mean, noun

MAX_SOCKET_PATH = 107  # octets: sun_path of unix(7), without its zero

_YAML_TAKES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "timestamp": "a date",
}


class ScalarKind(Kind):
    """A kind that is written as one text."""

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if node is None:
            return INVALID
        if not isinstance(node, Scalar):
            return reading.mistake(path, f"{noun(node)}: expected {self.words}")
        if node.tag == "null":
            return reading.mistake(path, f"nothing: expected {self.words}, or no such key")
        try:
            return self.parse(node, reading)
        except ValueError as error:
            return reading.mistake(path, str(error) or f"{shown(node.text)}: expected {self.words}")

    def parse(self, scalar: Scalar, reading: Reading) -> Any:
        """Raises ValueError, with a message if there is more to say than `words` do."""
        raise NotImplementedError


class TextKind(ScalarKind):
    """A kind whose texts YAML must take for texts: what looks like a number or a date is to be quoted."""

    pattern: str | None = None

    def parse(self, scalar: Scalar, reading: Reading) -> Any:
        if scalar.tag != "str":
            what = _YAML_TAKES.get(scalar.tag, "something else")
            raise ValueError(f"{shown(scalar.text)}: YAML takes this for {what}; put it in quotes")
        if self.pattern is not None and not re.fullmatch(self.pattern, scalar.text):
            raise ValueError
        return self.parse_text(scalar.text, reading)

    def parse_text(self, text: str, reading: Reading) -> Any:
        raise NotImplementedError

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string"} | ({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})


class Integer(ScalarKind):
    """A whole number in decimal digits."""

    def __init__(self, low: int, high: int, unit: str = "") -> None:
        self.low, self.high = low, high
        self.words = f"an integer, {low} to {high}{unit and ' ' + unit}"

    def parse(self, scalar: Scalar, reading: Reading) -> int:
        # Neither 010 nor 0x10, 1_0 or 1:30: integers all of them, and none of them what it looks like.
        if scalar.tag != "int" or not re.fullmatch(r"0|-?[1-9][0-9]{0,18}", scalar.text):
            raise ValueError
        if not self.low <= int(scalar.text) <= self.high:
            raise ValueError
        return int(scalar.text)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


class Flag(ScalarKind):
    """Yes or no, in the one spelling that YAML 1.1 and 1.2 agree on."""

    words = "true or false"

    def parse(self, scalar: Scalar, reading: Reading) -> bool:
        if scalar.tag != "bool" or scalar.text not in ("true", "false"):
            raise ValueError
        return scalar.text == "true"

    def json_schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


class Choice(ScalarKind):
    """One of a few words."""

    def __init__(self, choices: Mapping[str, Any]) -> None:
        self.choices = choices
        *rest, last = choices
        self.words = f"{', '.join(rest)} or {last}" if rest else last

    def parse(self, scalar: Scalar, reading: Reading) -> Any:
        if scalar.text in self.choices:
            return self.choices[scalar.text]
        raise ValueError(f"{shown(scalar.text)}: expected {self.words}{did_you_mean(scalar.text, self.choices)}")

    def to_json(self, value: Any) -> str:
        return next(word for word, choice in self.choices.items() if choice == value)

    def json_schema(self) -> dict[str, Any]:
        return {"enum": list(self.choices)}


class Name(TextKind):
    """A name that metrics, logs and people can carry unchanged."""

    words = "a name of up to 64 letters, digits, dots, hyphens and underscores"
    pattern = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

    def parse_text(self, text: str, reading: Reading) -> str:
        return text


class Moment(TextKind):
    """A second of UTC. Texts of this form are in the order of the moments, so that they can be compared as they are."""

    words = 'a moment as "2026-11-21T09:42:25Z"'
    pattern = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"

    def parse_text(self, text: str, reading: Reading) -> str:
        return text


class Secret(TextKind):
    """Any printable text. No message repeats it."""

    words = "a text of up to 256 printable characters"

    def parse(self, scalar: Scalar, reading: Reading) -> str:
        if scalar.tag != "str":
            raise ValueError(f"YAML takes this for {_YAML_TAKES.get(scalar.tag, 'something else')}; put it in quotes")
        if len(scalar.text) > 256 or not scalar.text.isprintable():
            raise ValueError(f"{len(scalar.text)} characters: expected {self.words}")
        return scalar.text

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": 256}


# Hex digits say what they are, and base64 that could be hex digits has to.
_BASE64 = "[A-Za-z0-9+/]"
_HEX = "(?:0x)?(?:[0-9A-Fa-f]{2}){1,15}"
_PADDED = f"(?:{_BASE64}{{4}}){{0,4}}(?:{_BASE64}{{2}}==|{_BASE64}{{3}}=)"
_FULL = f"(?:{_BASE64}{{4}}){{1,5}}"


def server_id_octets(text: str) -> bytes:
    """A server ID, 1 to 15 octets, in hex, or in base64 as cloud controllers tell it to servers. Raises ValueError."""
    if re.fullmatch(_HEX, text):
        return bytes.fromhex(text.removeprefix("0x"))
    digits = text.removeprefix("base64:")
    if not re.fullmatch(_PADDED, digits) and (digits == text or not re.fullmatch(_FULL, digits)):
        raise ValueError
    octets = base64.b64decode(digits)
    if base64.b64encode(octets).decode() != digits:
        raise ValueError(f"{shown(text)}: not what base64 makes of any octets")  # bits that nothing follows from
    return octets


class ServerIdText(TextKind):
    """A server ID, in any of its spellings."""

    words = "1 to 15 octets, two hex digits each, in quotes; or base64 that ends in = or begins with base64:"
    pattern = f"{_HEX}|{_PADDED}|base64:(?:{_PADDED}|{_FULL})"

    def parse_text(self, text: str, reading: Reading) -> bytes:
        return server_id_octets(text)

    def to_json(self, value: bytes) -> str:
        return value.hex()


class UdpAddress(TextKind):
    """An IP address and a port."""

    words = "ADDRESS:PORT, as in 192.0.2.1:443 or [2001:db8::1]:443"

    def parse_text(self, text: str, reading: Reading) -> Address:
        if len(text) > 80 or not text.isprintable():
            raise ValueError
        return Address.parse(text)

    def to_json(self, value: Address) -> str:
        return str(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^(?:[0-9.]+|\[[^\]]+\]):[0-9]+$"}


class IpAddress(TextKind):
    """An IP address alone."""

    words = "an IP address, as in 192.0.2.1 or 2001:db8::1"

    def parse_text(self, text: str, reading: Reading) -> str:
        if len(text) > 80 or not text.isprintable():
            raise ValueError
        try:
            return Address.parse(f"[{text}]:1" if ":" in text else f"{text}:1").host
        except ValueError as error:
            # What is wrong with an address that is one: a zone, or an IPv4 address in disguise.
            _, semicolon, expected = str(error).partition("; ")
            raise ValueError(f"{text}: {expected}" if semicolon else "") from None

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^[0-9A-Fa-f.:]+$"}


class InterfaceName(TextKind):
    """The name of a network interface, of those that the kernel allows the printable ones."""

    words = "the name of a network interface, up to 15 characters without spaces, colons and slashes"
    pattern = r"(?!\.{1,2}$)[!-.0-9;-~]{1,15}"

    def parse_text(self, text: str, reading: Reading) -> str:
        return text


class PortRange(TextKind):
    """UDP ports from one to another, both included."""

    words = "a range of ports, as in 1024-32767"
    pattern = "[1-9][0-9]{0,4}-[1-9][0-9]{0,4}"

    def parse_text(self, text: str, reading: Reading) -> range:
        first, last = map(int, text.split("-"))
        if not first <= last <= MAX_PORT:
            raise ValueError
        return range(first, last + 1)

    def to_json(self, value: range) -> str:
        return f"{value[0]}-{value[-1]}"


class FileName(TextKind):
    """The name of a file or directory; a relative one starts at the directory of the configuration file."""

    words = "the name of a file"

    def parse_text(self, text: str, reading: Reading) -> Path:
        if not text or not text.isprintable():
            raise ValueError
        if re.fullmatch(r"[0-9A-Fa-f]{32}|[0-9A-Fa-f]{64}", text):
            raise ValueError(f"{shown(text)}: looks like a key: expected the name of the file that holds it")
        return reading.directory / text

    def to_json(self, value: Path) -> str:
        return str(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "not": {"pattern": "^(?:[0-9A-Fa-f]{32}|[0-9A-Fa-f]{64})$"}}


class HttpAddress(TextKind):
    """Where HTTP is served: an address and a port, or a unix socket."""

    words = "ADDRESS:PORT, as in 127.0.0.1:9100, or unix:PATH"

    def parse_text(self, text: str, reading: Reading) -> Address | Path:
        if not text.isprintable():
            raise ValueError
        if text.startswith("unix:"):
            path = reading.directory / text.removeprefix("unix:")
            if text == "unix:" or len(str(path).encode()) > MAX_SOCKET_PATH:
                raise ValueError(f"{shown(text)}: expected a path of 1 to {MAX_SOCKET_PATH} octets behind unix:")
            return path
        if len(text) > 80:
            raise ValueError
        return Address.parse(text)

    def to_json(self, value: Address | Path) -> str:
        return f"unix:{value}" if isinstance(value, Path) else str(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^(?:unix:.+|[0-9.]+:[0-9]+|\[[^\]]+\]:[0-9]+)$"}


class Text(TextKind):
    """Some printable text."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.words = f"a text of 1 to {longest} printable characters"

    def parse_text(self, text: str, reading: Reading) -> str:
        if not 0 < len(text) <= self.longest or not text.isprintable():
            raise ValueError
        return text

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": self.longest}


class UrlPath(TextKind):
    """What a request asks for, with its query."""

    words = "a path that begins with a slash, up to 1024 visible ASCII characters"
    pattern = r"/[!-\x22$-~]{0,1023}"

    def parse_text(self, text: str, reading: Reading) -> str:
        return text


class HostName(TextKind):
    """A server's name, as its certificate has it."""

    words = "a host name, as in www.example.com"
    pattern = r"(?!.*\.\.)[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"

    def parse_text(self, text: str, reading: Reading) -> str:
        return text


class StatusRange(TextKind):
    """HTTP status codes from one to another, both included."""

    words = "a range of status codes, as in 200-299, or one, in quotes"
    pattern = "[1-5][0-9]{2}(?:-[1-5][0-9]{2})?"

    def parse_text(self, text: str, reading: Reading) -> range:
        first, _, last = text.partition("-")
        if int(last or first) < int(first):
            raise ValueError
        return range(int(first), int(last or first) + 1)

    def to_json(self, value: range) -> str:
        return f"{value[0]}" if len(value) == 1 else f"{value[0]}-{value[-1]}"


class Quantity(TextKind):
    """A decimal number and a unit, from `low` to `high`."""

    noun = ""
    units: dict[str, float]  # the largest last
    zero = ""  # the unit that nothing is written in
    whole = False

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        number = "[0-9]{1,12}" if self.whole else r"[0-9]{1,12}(?:\.[0-9]{1,9})?"
        self.pattern = f"{number}(?:{'|'.join(self.units)})"
        self.words = f"{self.noun}, {self.to_json(low)} to {self.to_json(high)}"

    def parse(self, scalar: Scalar, reading: Reading) -> Any:
        if scalar.tag in ("int", "float"):
            raise ValueError(f"{shown(scalar.text)}: a number without a unit: expected {self.words}")
        return super().parse(scalar, reading)

    def parse_text(self, text: str, reading: Reading) -> Any:
        unit = text.lstrip("0123456789.")
        number, scale = float(text.removesuffix(unit)), self.units[unit]
        # Divided where the unit is a part of one: 0.1 is 100 / 1000, and not 100 * 0.001.
        value = number * scale if scale >= 1 else number / round(1 / scale)
        if not self.low <= value <= self.high:
            raise ValueError
        return int(value) if self.whole else value

    def to_json(self, value: Any) -> str:
        if not value:
            return f"0{self.zero}"
        for unit, scale in reversed(self.units.items()):
            if value >= scale and float(f"{value / scale:.9g}").is_integer():
                return f"{value / scale:.9g}{unit}"
        unit, scale = next(iter(self.units.items()))
        return f"{value / scale:.9g}{unit}"


class Duration(Quantity):
    """Seconds, written with a unit."""

    noun = "a duration"
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    zero = "s"


class Size(Quantity):
    """Octets, written with a unit."""

    noun = "a size"
    units = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    whole = True
    zero = "B"


class Fraction(Quantity):
    """A part of one, written in percent."""

    noun = "a percentage"
    units = {"%": 0.01}
    zero = "%"
