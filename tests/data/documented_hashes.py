"""The hashes by which order, drops and crops are drawn, as docs/batches.md writes them."""

BITS = (1 << 64) - 1


def mix(k: int, v: int) -> int:
    x = k + 0x9E3779B97F4A7C15 * (v + 1) & BITS
    for _ in range(2):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & BITS
        x = (x ^ x >> 27) * 0x94D049BB133111EB & BITS
        x ^= x >> 31
    return x


def key_of(*values: int) -> int:
    result = 0
    for value in values:
        result = mix(result, value)
    return result
