"""A server's file, read again while the server runs: taken as a whole, or refused with every reason.

Nothing of a refused file is in force, and nothing of the one before is lost.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from backend.routable import Identity
from lb.cid import CidConfig, Codec, ServerId
from lb.errors import ConfigErrors, QuicLbError
from lb.generator import MIN_UNROUTABLE_LENGTH, CidGenerator, Marks
from lb.log import event
from lb.server_config import ServerConfig, load_server_config

log = logging.getLogger(__name__)


def identity_of(config: ServerConfig, marks: Marks | None) -> Identity:
    """Who a server is by its file. Raises QuicLbError for a nonce file that cannot be used."""
    cid_config = config.cid_config
    cid_length = cid_config.cid_length if cid_config else MIN_UNROUTABLE_LENGTH
    generator = CidGenerator(
        cid_config,
        config.server_id,
        random=os.urandom,
        marks=marks,
        unroutable_length=cid_length,
        on_low=lambda remaining: event(log, logging.WARNING, "nonces-low", remaining=remaining),
    )
    return Identity(
        generator,
        Codec(cid_config) if cid_config else None,
        config.server_id if cid_config else None,
        config.reset_key,
        cid_length=cid_length,
        random=os.urandom,
    )


def obstacles(config: ServerConfig) -> list[str]:
    """Why this server cannot run with a configuration that is good as such."""
    cid_config = config.cid_config
    if cid_config and cid_config.cid_length < MIN_UNROUTABLE_LENGTH:
        # All CIDs of this server have one length, those that it issues when its nonces run out too.
        shortest = f"expected at least {MIN_UNROUTABLE_LENGTH}"
        return [f"cid-config: connection IDs of {cid_config.cid_length} octets: {shortest}"]
    return []


class ServerFile:
    """The server's file at `path`, the configuration of it that is in force, and the identity that follows it."""

    def __init__(self, path: Path, config: ServerConfig, identity: Identity) -> None:
        self.path = path
        self.config = config
        self.reloads = {"taken": 0, "unchanged": 0, "refused": 0}
        self._identity = identity
        self._left: list[tuple[CidConfig, ServerId]] = []  # a process sees few rotations

    @property
    def files(self) -> Iterable[Path]:
        """What it was read from: the file, and the key files that it names."""
        return (self.path, *self.config.key_files)

    def reload(self) -> bool:
        """Read it again, and have the identity make connection IDs as it says; whether anything changed by it.

        A file with a mistake is refused, and the reasons logged. It takes effect between two datagrams: whoever
        changes the file replaces it as a whole.
        """
        try:
            config = load_server_config(self.path)
            reasons = [*obstacles(config), *self._reasons_against(config)]
        except ConfigErrors as errors:
            config, reasons = self.config, [str(error) for error in errors.exceptions]
        if not reasons and not self._differs(config):
            self.reloads["unchanged"] += 1
            self.config = config
            event(log, logging.INFO, "reload-unchanged")
            return False
        if not reasons:
            cid_config = config.cid_config
            try:
                self._identity.switch(
                    Codec(cid_config) if cid_config else None,
                    config.server_id if cid_config else None,
                    config.reset_key,
                )
            except (QuicLbError, ValueError) as error:
                reasons = [str(error)]
        if reasons:
            self.reloads["refused"] += 1
            for reason in reasons:
                event(log, logging.ERROR, "reload-refused", reason=reason)
            return False
        before = self.config
        if before.cid_config is not None:
            self._left.append((before.cid_config, before.server_id))
        self.config = config
        self.reloads["taken"] += 1
        return True

    def _differs(self, config: ServerConfig) -> bool:
        """Whether connection IDs and their reset tokens would be others."""
        now = self.config
        return (config.cid_config, config.server_id, config.reset_key) != (
            now.cid_config,
            now.server_id,
            now.reset_key,
        )

    def _reasons_against(self, config: ServerConfig) -> list[str]:
        """What speaks against a file that is good as such: it is stale, or cut off, or takes a restart."""
        now, restart = self.config, "a restart changes it"
        reasons = []
        if config.made and now.made and config.made < now.made:
            reasons.append(f"made: {config.made}: older than the configuration in force, which is of {now.made}")
        elif not config.made and (config.cid_config, config.server_id) in self._left and self._differs(config):
            # The draft's section 3.1: under an old configuration no connection ID is generated any more. Only a file
            # that says when it was made can say that this is meant.
            config_id = config.cid_config.config_id if config.cid_config else None
            reasons.append(
                f"cid-config: config ID {config_id} with this key and server ID: this process has left it for another "
                "already: expected a new key, or a file that says when it was made"
            )
        if config.nonce_file != now.nonce_file:
            reasons.append(f"nonce-file: {config.nonce_file}: this process has {now.nonce_file}; {restart}")
        # What is cut off in the middle may be good YAML. Nobody goes back to these on purpose.
        if now.cid_config and not config.cid_config:
            reasons.append(f"cid-config: missing: the configuration in force has one; {restart}")
        if now.reset_key and not config.reset_key:
            reasons.append(f"reset-key-file: missing: the configuration in force has one; {restart}")
        if config.cid_config and config.cid_config.cid_length != self._identity.cid_length:
            reasons.append(
                f"cid-config: connection IDs of {config.cid_config.cid_length} octets: this process has some of "
                f"{self._identity.cid_length}; {restart}"
            )
        return reasons
