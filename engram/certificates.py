"""The TLS context that the certificates in the settings make."""

from __future__ import annotations

import ssl
from pathlib import Path

from engram.config import Config
from engram.errors import ConfigError
from engram.files import read_file

_VERIFICATION = {"no": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "yes": ssl.CERT_REQUIRED}


def server_context(config: Config) -> ssl.SSLContext:
    """What TLS connections are accepted with: TLS 1.2 or later, OpenSSL's own choice of ciphers.

    The settings mean what they do in Redis: https://redis.io/docs/latest/operate/oss_and_stack/management/security/encryption/.
    The files are read at once. They are small, and are read at the start and when a setting is changed.

    Raises:
        ConfigError: a setting is missing, or a file cannot be used.
    """
    client_certificates = config.tls_auth_clients
    for name in ("tls-cert-file", "tls-key-file"):
        if not config.get(name):
            raise ConfigError(f"TLS needs a certificate and its key: {name} is not set")
    if client_certificates != "no" and not config.tls_ca_cert_file:
        raise ConfigError(
            "tls-ca-cert-file must say who signs the certificates of clients, unless tls-auth-clients is 'no'"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    _check_readable("tls-cert-file", config.tls_cert_file)
    _check_readable("tls-key-file", config.tls_key_file)
    try:
        # A password is given so that nobody is asked for one.
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password="")
    except ssl.SSLError as error:
        files = f"tls-cert-file '{config.tls_cert_file}' and tls-key-file '{config.tls_key_file}'"
        why = reason(error) if error.reason else "one is not PEM, or the key needs a password"
        raise ConfigError(f"{files} cannot be used together: {why}") from error
    if config.tls_ca_cert_file:
        _check_readable("tls-ca-cert-file", config.tls_ca_cert_file)
        try:
            context.load_verify_locations(config.tls_ca_cert_file)
        except ssl.SSLError as error:
            raise ConfigError(
                f"tls-ca-cert-file '{config.tls_ca_cert_file}' holds no certificates: {reason(error)}"
            ) from error
    context.verify_mode = _VERIFICATION[client_certificates]
    return context


def reason(error: BaseException | None) -> str:
    """What OpenSSL says, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error) if error is not None else ""


def _check_readable(name: str, path: str) -> None:
    # What the ssl module raises does not name the file; and it would wait for who writes into a pipe.
    try:
        read_file(Path(path))
    except OSError as error:
        raise ConfigError(f"{name} '{path}' cannot be read: {error.strerror}") from error
