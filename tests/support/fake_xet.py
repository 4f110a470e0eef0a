"""The hub's storage for large files, Xet, as far as hf_xet's own fallbacks need it.

A file arrives in chunks, packed into xorbs; a shard at the end says which. Here every xorb is
unpacked, and kept as the object that all its chunks make: so it serves for files that share none.
"""

import json
from hashlib import sha256

TOKEN = "storage-token"
EXPIRES = 4_102_444_800  # the year 2100


class Xet:
    """Answer what hf_xet asks; mixed into the handler of `fake_hub.FakeHub`."""

    def xet_token(self) -> None:
        found = {"casUrl": f"{self.server_hub.endpoint}/cas", "exp": EXPIRES, "accessToken": TOKEN}
        headers = {
            "X-Xet-Cas-Url": found["casUrl"],
            "X-Xet-Access-Token": TOKEN,
            "X-Xet-Token-Expiration": str(EXPIRES),
            "Content-Type": "application/json",
        }
        self.answer(200, headers=headers, body=json.dumps(found).encode())

    def xet_write(self, path: str, body: bytes) -> None:
        if path.startswith("/cas/v1/xorbs/"):
            content = unpack(body)
            self.server_hub.objects[sha256(content).hexdigest()] = content
            self.server_hub.stored.append(sha256(content).hexdigest())
            self.answer_json({"was_inserted": True})
        elif path == "/cas/v1/shards":
            self.answer_json({"result": 1})
        else:  # newer calls, without which it does
            self.answer(404)


def unpack(xorb: bytes) -> bytes:
    """Return the content of a xorb: chunks after headers of version, sizes and compression."""
    content, at = b"", 0
    while at < len(xorb) and xorb[at] == 0:  # what follows the chunks begins with a letter
        packed, kind, size = (
            int.from_bytes(xorb[at + 1 : at + 4], "little"),
            xorb[at + 4],
            int.from_bytes(xorb[at + 5 : at + 8], "little"),
        )
        chunk = xorb[at + 8 : at + 8 + packed]
        if kind:
            chunk = lz4(chunk)
        if kind == 2:  # first all first bytes of four, then all second ones
            grouped, chunk = chunk, bytearray(size)
            start = 0
            for k in range(4):
                count = len(range(k, size, 4))
                chunk[k::4] = grouped[start : start + count]
                start += count
        assert len(chunk) == size
        content += bytes(chunk)
        at += 8 + packed
    return content


def lz4(frame: bytes) -> bytes:
    """Unpack an LZ4 frame whose blocks may refer to earlier ones; checksums are not checked."""
    assert frame[:4] == b"\x04\x22\x4d\x18"
    flags = frame[4]
    at = 7 + (8 if flags & 8 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        block = frame[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            out += block
        else:
            lz4_block(block, out)
        at += 4 + len(block) + (4 if flags & 16 else 0)
    return bytes(out)


def lz4_block(block: bytes, out: bytearray) -> None:
    at = 0

    def length(short: int) -> int:
        nonlocal at
        total, more = short, short == 15
        while more:
            total += block[at]
            more = block[at] == 255
            at += 1
        return total

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        offset = int.from_bytes(block[at : at + 2], "little")
        at += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-offset])
