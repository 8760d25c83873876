"""Read a shard without HDF5: numpy and mmap, from the format specification alone (superblock 0, version 1 headers)."""

import struct

import numpy as np


def u(data, at, size):
    return int.from_bytes(data[at : at + size], "little")


def messages(data, address):
    """Type and bytes of each message of an object header."""
    assert data[address] == 1, "object header version"
    left = u(data, address + 2, 2)
    blocks = [(address + 16, u(data, address + 8, 4))]
    for start, size in blocks:
        at = start
        while left and at < start + size:
            kind, length = u(data, at, 2), u(data, at + 2, 2)
            body = bytes(data[at + 8 : at + 8 + length])
            if kind == 0x10:
                blocks.append(struct.unpack("<QQ", body[:16]))
            yield kind, body
            at, left = at + 8 + length, left - 1


def members(data, tree, heap):
    """Name and object header address of each link of a group."""
    assert bytes(data[heap : heap + 4]) == b"HEAP"
    names = u(data, heap + 24, 8)
    nodes = [tree]
    for node in nodes:
        assert bytes(data[node : node + 4]) == b"TREE" and data[node + 4] == 0
        for i in range(u(data, node + 6, 2)):
            child = u(data, node + 32 + 16 * i, 8)
            if data[node + 5]:
                nodes.append(child)
                continue
            assert bytes(data[child : child + 4]) == b"SNOD"
            for j in range(u(data, child + 6, 2)):
                entry = child + 8 + 40 * j
                assert u(data, entry + 16, 4) == 0, "a hard link"
                start = names + u(data, entry, 8)
                yield bytes(data[start : start + 64]).split(b"\0")[0].decode(), u(data, entry + 8, 8)


def dtype_of(body):
    kind, bits, size = body[0] & 15, body[1], u(body, 4, 4)
    if kind == 3:
        return np.dtype(f"S{size}")
    assert kind in (0, 1) and not bits & 1, "little-endian numbers"
    return np.dtype(f"<{'f' if kind else 'i' if bits & 8 else 'u'}{size}")


def dataset(data, address):
    """The array that an object header describes."""
    found = dict(messages(data, address))
    space, layout = found[0x1], found[0x8]
    assert space[0] == 1 and layout[0] == 3 and layout[1] == 1, "contiguous"
    assert not {0x7, 0xB, 0xC, 0xE, 0x12} & set(found), "no external files, filters, attributes or times"
    shape = struct.unpack(f"<{space[1]}Q", space[8 : 8 + 8 * space[1]])
    start, size = struct.unpack("<QQ", layout[2:18])
    dtype = dtype_of(found[0x3])
    assert size == int(np.prod(shape)) * dtype.itemsize
    return np.ndarray(shape, dtype, data, start if size else 0)


def read(path):
    """All datasets of a file, by name."""
    data = np.memmap(path, mode="r")
    assert bytes(data[:8]) == b"\x89HDF\r\n\x1a\n" and data[8] == 0 and data[13] == data[14] == 8
    assert u(data, 24, 8) == 0 and u(data, 40, 8) == len(data), "base address and end of file"
    (group,) = (body for kind, body in messages(data, u(data, 64, 8)) if kind == 0x11)
    return {name: dataset(data, address) for name, address in members(data, *struct.unpack("<QQ", group[:16]))}
