"""Which key goes to which host. A key is sent to one host alone.

SOLON_API_KEYS holds a JSON object of hosts and keys: {"api.example.com": "sk-…", "10.0.0.5:8000": "…"}. SOLON_API_KEY is
the key of the one host that a command names; where it names several, each needs an entry in SOLON_API_KEYS. OPENAI_API_KEY
goes to OpenAI, or to the host of OPENAI_BASE_URL. Over plain http a key goes to this machine only, unless
SOLON_ALLOW_HTTP_KEY=1 is set.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from pydantic import SecretStr

from solon.errors import InputError, printable


def key_for(base_url: str) -> SecretStr | None:
    """The key for this host, or None. Raises InputError for what cannot be a key, or may not be sent there."""
    name, key = _found(base_url)
    if not re.fullmatch(r"[!-~]*", key):  # no header carries it, and the HTTP library's error would show it
        raise InputError(f"{name}: has characters that no key has (a space, a line break); set it anew")
    if not key:
        return None
    if (
        urlsplit(base_url).scheme == "http"
        and not is_loopback(base_url)
        and os.environ.get("SOLON_ALLOW_HTTP_KEY") != "1"
    ):
        raise InputError(
            f"{base_url}: {name} would go there in clear, over http; use https, or set SOLON_ALLOW_HTTP_KEY=1 "
            "where the network is yours"
        )
    return SecretStr(key)


def check_keys(base_urls: Iterable[str]) -> None:
    """Raises InputError where SOLON_API_KEY would go to more than one host."""
    hosts = {urlsplit(url).netloc for url in base_urls if _found(url)[0] == "SOLON_API_KEY"}
    if len(hosts) > 1:
        raise InputError(
            f"SOLON_API_KEY is the key of one host, and this command names {len(hosts)}: {', '.join(sorted(hosts))}; "
            """set SOLON_API_KEYS to {"HOST": "KEY", …} with a key or "" for each"""
        )


def _found(base_url: str) -> tuple[str, str]:
    """Where the key for this host comes from, and the key; an empty one where there is none."""
    parts = urlsplit(base_url)
    given = _named()
    for host in (parts.netloc, parts.hostname or ""):
        if host in given:
            return "SOLON_API_KEYS", given[host].strip()
    own, openais = os.environ.get("SOLON_API_KEY", "").strip(), os.environ.get("OPENAI_API_KEY", "").strip()
    if openais and is_openai(base_url) and not own:
        return "OPENAI_API_KEY", openais
    return ("SOLON_API_KEY" if own else ""), own


def _named() -> dict[str, str]:
    text = os.environ.get("SOLON_API_KEYS", "").strip()
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found.values()):
        raise InputError("""SOLON_API_KEYS: expected a JSON object of hosts and keys, {"api.example.com": "sk-…"}""")
    for host in found:
        if "/" in host:
            raise InputError(f"SOLON_API_KEYS: {printable(host, 60)}: expected a host or host:port, without http://")
    return found


def is_openai(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    own = urlsplit(os.environ.get("OPENAI_BASE_URL", "")).netloc
    if own and own == urlsplit(base_url).netloc:
        return True
    return base_url.startswith("https://") and (host == "openai.com" or host.endswith(".openai.com"))


def is_loopback(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
