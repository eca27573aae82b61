"""Certificates as operators have them, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def a_certificate(folder: Path, *names: str) -> Path:
    """A folder with `fullchain.pem` and `privkey.pem` for these names, or for localhost."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [f"IP:{n}" if n.replace(".", "").isdigit() else f"DNS:{n}" for n in names]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem",
         "-days", "30", "-subj", "/CN=test",
         "-addext", f"subjectAltName={','.join(given or ['DNS:localhost'])}"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def expired(folder: Path) -> Path:
    """The same certificate, signed again to have ended yesterday."""
    chain, key = folder / "fullchain.pem", folder / "privkey.pem"
    subprocess.run(
        ["openssl", "x509", "-in", chain, "-signkey", key, "-days", "-1", "-out", chain],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder
