"""Certificates for tests of TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

import attrs
import trustme


@attrs.frozen
class Identity:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Issues certificates into a folder; `file` holds its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, *identities: str) -> Identity:
        """A certificate for host names, or for a client."""
        issued = self._authority.issue_cert(*(identities or ("localhost", "127.0.0.1")))
        identity = Identity(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(str(identity.certificate))
        issued.private_key_pem.write_to_path(str(identity.key))
        return identity

    def client_context(self, identity: Identity | None = None) -> ssl.SSLContext:
        """What a client needs that trusts the authority; with `identity` it can show who it is."""
        context = ssl.create_default_context(cafile=self.file)
        if identity is not None:
            context.load_cert_chain(identity.certificate, identity.key)
        return context
