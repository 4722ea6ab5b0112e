# Symbols: bytes of the venue's spelling -> small dense id.
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from tradecore._rows cimport SYMBOL_MAX_BYTES
from tradecore._words cimport first8

# One symbol of the hash table: the venue's spelling and the one of its stream names, zeros behind.
ctypedef struct symbol_entry_t:
    char name[SYMBOL_MAX_BYTES]
    char lower[SYMBOL_MAX_BYTES]
    uint16_t size
    int32_t symbol_id

ctypedef struct symbol_table_t:
    symbol_entry_t *slots
    uint32_t mask


cdef inline uint32_t hash_name(const char *name, Py_ssize_t size) noexcept nogil:
    """Hash a name of 1 to SYMBOL_MAX_BYTES bytes; 7 bytes behind it must be readable."""
    cdef uint64_t h = <uint64_t>size
    cdef Py_ssize_t i
    for i in range(0, size, 8):
        h = (h ^ first8(name + i, size - i)) * <uint64_t>0x9E3779B97F4A7C15
        h ^= h >> 29
    return <uint32_t>(h >> 32)


cdef inline bint is_name(const char *known, const char *name, Py_ssize_t size) noexcept nogil:
    """Compare with a name of the table of the same size; 7 bytes behind it must be readable."""
    cdef Py_ssize_t i
    for i in range(0, size, 8):
        if first8(known + i, 8) != first8(name + i, size - i):
            return False
    return True


cdef inline const symbol_entry_t *find_wide(
    const symbol_table_t *symbols, const char *name, Py_ssize_t size
) noexcept nogil:
    """As `find_symbol`, where 7 bytes behind the name are readable."""
    cdef uint32_t i
    cdef const symbol_entry_t *entry
    if size <= 0 or size > SYMBOL_MAX_BYTES:
        return NULL
    i = hash_name(name, size) & symbols.mask
    while True:
        entry = &symbols.slots[i]
        if entry.size == 0:
            return NULL
        if entry.size == size and is_name(entry.name, name, size):
            return entry
        i = (i + 1) & symbols.mask


cdef inline const symbol_entry_t *find_symbol(
    const symbol_table_t *symbols, const char *name, Py_ssize_t size
) noexcept nogil:
    """Look a symbol up by its exact bytes; NULL when it is not in the table."""
    cdef char wide[SYMBOL_MAX_BYTES + 7]
    if size <= 0 or size > SYMBOL_MAX_BYTES:
        return NULL
    memset(wide, 0, sizeof(wide))
    memcpy(wide, name, size)
    return find_wide(symbols, wide, size)


cdef class SymbolTable:
    cdef symbol_table_t table
    cdef list _names
    cdef list _utf8
    cdef int _grow(self) except -1
    cdef void _insert(self, const char *name, Py_ssize_t size, int symbol_id) noexcept
