"""The heap in which a process on a CPU keeps the memory of freed tensors, by its own allocator."""

from __future__ import annotations

import ctypes
import platform

from megatron_lcl.train.engine import KEPT

_ALIGNED = 64
"""bytes to which torch aligns tensors"""
_COUNTER = 24
"""bytes of what torch makes after a tensor's memory and frees after it: its counter of changes (VersionCounter)"""
_MAPPED = 2
"""in the number before a block: it has pages of its own (glibc's malloc.c, IS_MMAPPED)"""
_GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
if _GLIBC is not None:
    _GLIBC.sbrk.restype, _GLIBC.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    _GLIBC.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    _GLIBC.malloc.restype, _GLIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    _GLIBC.free.restype, _GLIBC.free.argtypes = None, [ctypes.c_void_p]

Place = tuple[int, int]
"""of a block, and of its counter"""


class Heap:
    """Blocks that glibc's malloc really places in this process's heap. Nothing is written to them: they take addresses.

    How much a heap grows for tensors depends on the small objects beside them. glibc cuts an aligned block out of a
    free one that is 96 bytes larger, and what is left before it is free again: mostly just as much as the counter
    takes. When both are freed, its place may go to an object that stays as long as a graph. Then the place of the
    tensor is too small for the next of its size, and is not one with its free neighbors. In a simulated step the
    objects of graphs are those of a real one; a tensor's counter comes before its block, so another is made here.

    The process allocates as a run does (`keep_freed_memory`), on its main thread. Another C library has rules of its
    own: there the heap holds blocks of up to `KEPT` bytes without gaps.
    """

    def __init__(self) -> None:
        self._in_use = self._most = self._grown = 0

    @property
    def size(self) -> int:
        """Bytes that were needed, with what lies between blocks."""
        return max(self._most, self._grown)  # the process may have had free ones before

    def take(self, size: int) -> Place | None:
        """Where a new block of so many bytes is; None: not in the heap, as pages that come and go with it."""
        place = self._take(size)
        if place is not None:
            self._in_use += size
            self._most = max(self._most, self._in_use)
        return place

    def _take(self, size: int) -> Place | None:
        if _GLIBC is None:
            return (0, 0) if size <= KEPT else None
        block, end = ctypes.c_void_p(), _GLIBC.sbrk(0)
        if _GLIBC.posix_memalign(ctypes.addressof(block), _ALIGNED, size) or not block.value:
            return None  # the system limits addresses (ulimit -v)
        self._grown += _GLIBC.sbrk(0) - end
        if ctypes.c_size_t.from_address(block.value - ctypes.sizeof(ctypes.c_size_t)).value & _MAPPED:
            _GLIBC.free(block)
            return None
        return block.value, _GLIBC.malloc(_COUNTER)

    def give(self, place: Place, size: int) -> None:
        """A block is free again."""
        self._in_use -= size
        if _GLIBC is not None:
            for address in place:
                _GLIBC.free(address)
