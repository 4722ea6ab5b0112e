# Symbols: bytes of the venue's spelling -> small dense id.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp

from tradecore._rows cimport SYMBOL_MAX_BYTES

# One symbol of the hash table: the venue's spelling and the one of its stream names.
ctypedef struct symbol_entry_t:
    char name[SYMBOL_MAX_BYTES]
    char lower[SYMBOL_MAX_BYTES]
    uint16_t size
    int32_t symbol_id

ctypedef struct symbol_table_t:
    symbol_entry_t *slots
    uint32_t mask


cdef inline uint32_t hash_name(const char *name, Py_ssize_t size) noexcept nogil:
    cdef uint64_t h = <uint64_t>size
    cdef Py_ssize_t i
    for i in range(size):
        h = (h ^ <uint8_t>name[i]) * <uint64_t>0x9E3779B97F4A7C15
        h ^= h >> 29
    return <uint32_t>(h >> 32)


cdef inline const symbol_entry_t *find_symbol(
    const symbol_table_t *symbols, const char *name, Py_ssize_t size
) noexcept nogil:
    """Look a symbol up by its exact bytes; NULL when it is not in the table."""
    cdef uint32_t i
    cdef const symbol_entry_t *entry
    if size <= 0 or size > SYMBOL_MAX_BYTES:
        return NULL
    i = hash_name(name, size) & symbols.mask
    while True:
        entry = &symbols.slots[i]
        if entry.size == 0:
            return NULL
        if entry.size == size and memcmp(entry.name, name, size) == 0:
            return entry
        i = (i + 1) & symbols.mask


cdef class SymbolTable:
    cdef symbol_table_t table
    cdef list _names
    cdef list _utf8
    cdef int _grow(self) except -1
    cdef void _insert(self, const char *name, Py_ssize_t size, int symbol_id) noexcept
