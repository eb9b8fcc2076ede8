"""What a server of the web may answer: the rules of downloads and of shards over http alike.

A redirect is followed where it stays with the host or goes to https. Refused: from https to http, and over
http to another host of an internal address where the host that was asked for has a public one, or to a
link-local one (169.254.169.254 gives away the keys of a machine in a cloud). Refused, too: bodies that are
compressed on the way, which nothing here would open, and other ranges than the one asked for.
"""

import re
import socket
from collections.abc import Iterator, Mapping
from email.message import Message
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5


class AnswerRefusedError(PermissionError):
    """An answer that is not taken, and wouldn't be the next time."""


def check_redirect(url: str, location: str) -> None:
    """Raise AnswerRefusedError where a redirect from `url` to `location` must not be followed."""
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    reason = ""
    if new.scheme not in ("http", "https") or not new.hostname:
        reason = "which is no address of the web"
    elif old.scheme == "https" and new.scheme == "http":
        reason = "out of https"
    elif new.scheme == "http" and new.hostname != old.hostname:
        places = list(_addresses(new.hostname))
        asked = all(address.is_global for address in _addresses(old.hostname or ""))
        if any(a.is_link_local or (asked and not a.is_global) for a in places):
            reason = "an internal address"
    if reason:
        raise AnswerRefusedError(f"it is redirected to {target!r}, {reason}")


def check_answer(
    headers: Mapping[str, str] | Message, start: int | None = None, end: int | None = None
) -> None:
    """Raise AnswerRefusedError for a compressed body or, of status 206, another range than start..end."""
    if (encoding := headers.get("Content-Encoding", "identity")) not in ("", "identity"):
        raise AnswerRefusedError(f"the body is compressed on the way ({encoding}), which nobody asked for")
    if start is not None:
        said = headers.get("Content-Range", "none")
        found = re.match(r"bytes ([0-9]+)-([0-9]+)/", said)
        if found is None or int(found[1]) != start or (end is not None and int(found[2]) > end):
            raise AnswerRefusedError(f"another range ({said}) than from byte {start} on was sent")


def _addresses(host: str) -> Iterator[IPv4Address | IPv6Address]:
    """The addresses of a host; none where it has none, or none can be asked for."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # who connects to it says so
        return
    for entry in found:
        address = ip_address(entry[4][0])
        yield getattr(address, "ipv4_mapped", None) or address
