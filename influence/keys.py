"""All randomness of the package: a pure function of a key, and nowhere else.

A key is a tuple of text and integers, hashed as a whole (never combined by arithmetic), so that streams of different
purposes, images, draws or parameters cannot collide. The bits are Philox4x64 (Salmon et al., 2011), whose raw output
numpy guarantees never to change; what is made of the bits is written out here for the same reason.
"""

import hashlib

import numpy as np

Key = tuple[str | int, ...]


def digest(*key: str | int) -> bytes:
    """Hash a key to 128 bits, unambiguously: each part carries its type and its length."""
    hasher = hashlib.blake2b(digest_size=16, person=b"influence.keys.1")
    for part in key:
        data = part.encode() if isinstance(part, str) else str(int(part)).encode()
        hasher.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode() + data)
    return hasher.digest()


def bits(key: Key, count: int) -> np.ndarray:
    """Draw uint64 words `[count]`."""
    words = np.frombuffer(digest(*key), dtype="<u8")
    return np.random.Philox(key=words).random_raw(count)


def uniform(key: Key, count: int) -> np.ndarray:
    """Draw float64 numbers `[count]`, uniform in [0, 1)."""
    return (bits(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(key: Key, count: int, bound: int) -> np.ndarray:
    """Draw int64 numbers `[count]`, uniform in 0 … bound − 1 (bias below bound · 2⁻⁵³)."""
    return np.floor(uniform(key, count) * bound).astype(np.int64)


def signs(key: Key, count: int) -> np.ndarray:
    """Draw int8 signs `[count]`, −1 or +1 with equal probability."""
    words = bits(key, -(-count // 64)).astype("<u8")
    ones = np.unpackbits(words.view(np.uint8), bitorder="little", count=count)
    return ones.astype(np.int8) * np.int8(2) - np.int8(1)


def normal(key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """Draw float32 standard normal numbers of the given shape, by Box and Muller (1958)."""
    count = int(np.prod(shape))
    pairs = -(-count // 2)
    u = uniform(key, 2 * pairs)
    radius = np.sqrt(-2.0 * np.log1p(-u[:pairs]))
    angle = 2.0 * np.pi * u[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float32).reshape(shape)
