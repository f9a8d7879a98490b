"""What quiclb raises to the people and programs that configure it. Packets never raise."""

from __future__ import annotations


class QuicLbError(Exception):
    """The base of every exception that quiclb raises on purpose."""


class ConfigError(QuicLbError):
    """One mistake in a configuration file.

    `path` says where (`services[0].backends[2].server-ids`), `message` names the value found and what was expected.
    A message never holds the octets of a key.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
        self.message = message


class ConfigErrors(ExceptionGroup[ConfigError]):
    """Every mistake of one configuration file, in the order of the file."""

    def derive(self, excs: object) -> ConfigErrors:  # type: ignore[override]
        return ConfigErrors(self.message, excs)  # type: ignore[arg-type]
