"""The key for each host. A key is sent to one host alone.

SOLON_API_KEYS holds a JSON object of hosts and keys: {"api.example.com": "sk-…", "10.0.0.5:8000": "…"}. SOLON_API_KEY is the
key of the one host that a command names. If a command names several hosts, each needs an entry in SOLON_API_KEYS.
OPENAI_API_KEY goes to OpenAI, or to the host of OPENAI_BASE_URL. Over plain http a key goes to this machine only, unless
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
    """The key for this host, or None. Raises InputError for a text that no key can be, or a key that http would expose."""
    variable, key = _key_and_variable(base_url)
    if not re.fullmatch(r"[!-~]*", key):  # no header carries such a key, and the HTTP library's error would show it
        raise InputError(f"{variable}: has characters that no key has (a space, a line break); set it anew")
    if not key:
        return None
    is_open = urlsplit(base_url).scheme == "http" and not is_loopback(base_url)
    if is_open and os.environ.get("SOLON_ALLOW_HTTP_KEY") != "1":
        raise InputError(
            f"{base_url}: {variable} would go there in clear, over http; use https, or set SOLON_ALLOW_HTTP_KEY=1 "
            "where the network is yours"
        )
    return SecretStr(key)


def check_keys(base_urls: Iterable[str]) -> None:
    """Raises InputError where SOLON_API_KEY would go to more than one host."""
    hosts = {urlsplit(url).netloc for url in base_urls if _key_and_variable(url)[0] == "SOLON_API_KEY"}
    if len(hosts) > 1:
        raise InputError(
            f"SOLON_API_KEY is the key of one host, and this command names {len(hosts)}: {', '.join(sorted(hosts))}; "
            """set SOLON_API_KEYS to {"HOST": "KEY", …} with a key or "" for each"""
        )


def _key_and_variable(base_url: str) -> tuple[str, str]:
    """(environment variable, key) for a host. The key is empty where there is none."""
    parts = urlsplit(base_url)
    keys = _keys_by_host()
    for host in (parts.netloc, parts.hostname or ""):
        if host in keys:
            return "SOLON_API_KEYS", keys[host].strip()
    solon_key, openai_key = (os.environ.get(name, "").strip() for name in ("SOLON_API_KEY", "OPENAI_API_KEY"))
    if openai_key and is_openai(base_url) and not solon_key:
        return "OPENAI_API_KEY", openai_key
    return ("SOLON_API_KEY" if solon_key else ""), solon_key


def _keys_by_host() -> dict[str, str]:
    text = os.environ.get("SOLON_API_KEYS", "").strip()
    if not text:
        return {}
    try:
        keys = json.loads(text)
    except ValueError:
        keys = None
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise InputError("""SOLON_API_KEYS: expected a JSON object of hosts and keys, {"api.example.com": "sk-…"}""")
    for host in keys:
        if "/" in host:
            raise InputError(f"SOLON_API_KEYS: {printable(host, 60)}: expected a host or host:port, without http://")
    return keys


def is_openai(base_url: str) -> bool:
    """Whether the address is OpenAI's, or has the host of OPENAI_BASE_URL."""
    parts = urlsplit(base_url)
    configured = urlsplit(os.environ.get("OPENAI_BASE_URL", "")).netloc
    host = parts.hostname or ""
    is_theirs = base_url.startswith("https://") and (host == "openai.com" or host.endswith(".openai.com"))
    return is_theirs or bool(configured and configured == parts.netloc)


def is_loopback(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
