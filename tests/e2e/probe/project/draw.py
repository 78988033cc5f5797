"""Draws a square without any package: the PNG format is simple enough."""

import argparse
import json
import struct
import zlib

COLOURS = {"green": (0, 160, 80), "red": (200, 30, 30)}


def png(size, colour):
    """A size x size picture of one colour."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows = (b"\0" + bytes(colour) * size) * size
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


parser = argparse.ArgumentParser()
parser.add_argument("--size", type=int)
parser.add_argument("--colour")
options = parser.parse_args()
picture = png(options.size, COLOURS[options.colour])
with open("/valohai/outputs/square.png", "wb") as file:
    file.write(picture)
print(f"drew a {options.colour} square of size {options.size}")
print(json.dumps({"area": options.size**2, "bytes": len(picture)}))
