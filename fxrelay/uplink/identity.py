"""Task: who this relay is: its name, its own key, and the gateways that know it. All disk work is done in worker threads."""

import json
import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fxtunnel.errors import ConfigError
from fxtunnel.kit.files import make_private_dir, read_secret, write_secret
from fxtunnel.kit.tokens import key_from_pem, key_to_pem, new_key, public_to_text, sign_assertion, thumbprint
from fxtunnel.model import GatewayId, InstanceId, RelayId

logger = logging.getLogger(__name__)

KEY_FILE: Final = "relay.key"


@dataclass(frozen=True, slots=True)
class Identity:
    """A relay in one run of its process. `instance` is random, so a gateway can tell a reconnect from a take-over."""

    relay_id: RelayId
    instance: InstanceId
    state_dir: Path
    key: Ed25519PrivateKey = field(repr=False)

    @property
    def kid(self) -> str:
        """The id of the key: its thumbprint."""
        return thumbprint(self.key.public_key())

    @property
    def public_key(self) -> str:
        """The public half, as enrolment sends it."""
        return public_to_text(self.key.public_key())

    def assertion(self, gateway_id: GatewayId, binding: str, now_unix: float) -> str:
        """A fresh proof of identity, for the one connection to that gateway whose `binding` it is, within 60 s. Never log it."""
        return sign_assertion(self.key, self.relay_id, gateway_id, binding, now_unix)

    async def is_enrolled(self, gateway_id: GatewayId) -> bool:
        """Whether the gateway has taken this key for this name before. A lost note only means to enrol once more."""
        return await trio.to_thread.run_sync(self._is_noted, gateway_id)

    async def note_enrolment(self, gateway_id: GatewayId) -> None:
        """Remember that the gateway has taken the key. Cancelling waits for the write.

        Raises:
            ConfigError: the note cannot be written.
        """
        note = json.dumps({"kid": self.kid, "relay_id": self.relay_id}).encode() + b"\n"
        await trio.to_thread.run_sync(write_secret, self._note(gateway_id), note)

    def _note(self, gateway_id: GatewayId) -> Path:
        return self.state_dir / f"enrolled-{gateway_id}.json"

    def _is_noted(self, gateway_id: GatewayId) -> bool:
        path = self._note(gateway_id)
        if not os.path.lexists(path):
            return False
        try:
            note = json.loads(read_secret(path))
        except (ValueError, RecursionError, ConfigError) as exc:
            logger.warning("the note of enrolment %s cannot be used, enrolling again: %s", path, exc)
            return False
        # Another key or another name was enrolled then; the gateway knows neither of them for us.
        return isinstance(note, dict) and note.get("kid") == self.kid and note.get("relay_id") == self.relay_id


async def load_identity(state_dir: Path, relay_id: RelayId) -> Identity:
    """The relay's identity, with its key from `state_dir`; the directory (0700) and the key (0600) are made the first time.

    Raises:
        ConfigError: the directory or the key is accessible by others, unusable, or cannot be made.
    """
    key = await trio.to_thread.run_sync(_load_or_make_key, state_dir)
    return Identity(relay_id, InstanceId(secrets.token_hex(16)), state_dir, key)


def _load_or_make_key(state_dir: Path) -> Ed25519PrivateKey:
    make_private_dir(state_dir)
    path = state_dir / KEY_FILE
    if not os.path.lexists(path):
        write_secret(path, key_to_pem(new_key()))
        logger.info("made the relay's key %s", path)
    pem = read_secret(path)
    try:
        return key_from_pem(pem)
    except ConfigError as exc:
        raise ConfigError.one(path, "", exc.problems[0].message) from exc
