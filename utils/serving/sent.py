"""Pictures that are sent to a server, in a request or by an address of the web.

Whoever may ask the server must not reach, through it, what only the server reaches: machines of its
own network, and its disk.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import socket
from collections.abc import Callable
from ipaddress import IPv6Network, ip_address
from typing import BinaryIO, TypeVar

import httpx2
import numpy as np

from cores.dataset.files.images import image_size, read_image
from cores.model.inference.inputs import load_image
from cores.utils.serving.protocol import Refused

T = TypeVar("T")
FETCH_SECONDS = 10.0
UNICAST = IPv6Network("2000::/3")  # All that the internet's IPv6 uses.


class SentPicture:
    """The bytes of a picture's file, named by their place in the request."""

    def __init__(self, content: bytes, place: str):
        self.content, self.place = content, place

    def __str__(self) -> str:
        return self.place

    def open(self, mode: str) -> BinaryIO:
        """``mode``: "rb"."""
        return io.BytesIO(self.content)

    def require(self) -> None:
        """Raises Refused for what is no picture or has too many pixels, as far as its first bytes
        say."""
        self._read(lambda: image_size(self))

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3) RGB. Raises Refused."""
        return self._read(lambda: load_image(read_image(self), self.place)[0])

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except ValueError as error:
            said = str(error).removesuffix("; replace or remove the file")
            raise Refused(400, said, self.place, "invalid_image") from None


def from_data(address: str, place: str) -> SentPicture:
    """Of an address data:…;base64,…. Raises Refused."""
    head, comma, content = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(422, f"{place}: the form data:image/…;base64,… is needed", place)
    try:
        # Some programs write base64 in lines.
        return SentPicture(base64.b64decode("".join(content.split()), validate=True), place)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{place}: is no valid base64", place, "invalid_image") from None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet."""
    found = ip_address(address.partition("%")[0])
    if found.version == 6 and (found not in UNICAST or found.sixtofour or found.teredo):
        return False  # among them IPv4 addresses in other clothes
    return found.is_global and not found.is_multicast


async def fetch(address: str, place: str, most: int) -> SentPicture:
    """What lies at an http(s) address, at most ``most`` bytes. Raises Refused.

    The name is looked up once and that very address is connected to, so that a name cannot mean the
    internet when it is checked and this network afterwards. Redirections are not followed.
    """

    def refused(status: int, why: str) -> Refused:
        return Refused(status, f"{place}: {why}", place, "invalid_image_url")

    try:
        async with asyncio.timeout(FETCH_SECONDS):
            url = httpx2.URL(address)
            port = url.port or {"http": 80, "https": 443}[url.scheme]
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
            places = [str(entry[4][0]) for entry in found]
            if not places or not all(map(is_public, places)):
                raise refused(422, "is no address of the open internet, and is not fetched")
            async with httpx2.AsyncClient(trust_env=False, follow_redirects=False) as client:
                request = client.build_request(
                    "GET",
                    url.copy_with(host=places[0]),
                    headers={
                        "Host": url.netloc.decode("ascii"),
                        "Accept": "image/*",
                        "Accept-Encoding": "identity",
                    },
                    extensions={"sni_hostname": url.host},
                )
                response = await client.send(request, stream=True)
                try:
                    if response.status_code != 200:
                        raise refused(400, f"the address answers {response.status_code}")
                    content = bytearray()
                    async for part in response.aiter_raw():
                        content += part
                        if len(content) > most:
                            raise refused(400, f"is more than {most / 2**20:g} MB")
                    return SentPicture(bytes(content), place)
                finally:
                    await response.aclose()
    except TimeoutError:
        raise refused(400, f"could not be fetched within {FETCH_SECONDS:g} seconds") from None
    except (OSError, ValueError, KeyError, httpx2.HTTPError, httpx2.InvalidURL):
        raise refused(400, "could not be fetched") from None
