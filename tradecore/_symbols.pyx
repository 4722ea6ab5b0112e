"""The table of symbols: ids for the rows, names for the database."""

from libc.stdlib cimport calloc, free


cdef int _require_id(list names, int symbol_id) except -1:
    # Without this an id of nobody reads wild memory: lists are indexed unchecked here.
    if not 0 <= symbol_id < len(names):
        raise IndexError(f"no symbol has the id {symbol_id}")
    return 0


cdef class SymbolTable:
    """Append-only table of symbols; ids are dense from 0 and hold for the table's life."""

    def __cinit__(self):
        self._names = []
        self._utf8 = []
        self.table.mask = 63
        self.table.slots = <symbol_entry_t *>calloc(64, sizeof(symbol_entry_t))
        if self.table.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.table.slots)

    def __len__(self):
        return len(self._names)

    def add(self, str symbol not None):
        """Return the id of `symbol`, adding it if needed.

        Raises ValueError for an empty symbol, one of more than SYMBOL_MAX_BYTES UTF-8 bytes, and
        one that JSON must escape: the fast path compares a frame's bytes as they stand.
        """
        cdef bytes name = symbol.encode()
        known = self.get(symbol)
        if known is not None:
            return known
        if not 0 < len(name) <= SYMBOL_MAX_BYTES:
            raise ValueError(f"symbol {symbol!r} must have 1 to {SYMBOL_MAX_BYTES} UTF-8 bytes")
        if any(byte < 0x20 or byte == 0x22 or byte == 0x5C for byte in name):
            raise ValueError(f"symbol {symbol!r} holds a control character, a quote or a backslash")
        if 2 * (len(self._names) + 1) > self.table.mask:
            self._grow()
        symbol_id = len(self._names)
        self._names.append(symbol)
        self._utf8.append(name)
        self._insert(name, len(name), symbol_id)
        return symbol_id

    def get(self, str symbol not None):
        """Return the id of `symbol`, or None."""
        cdef bytes name = symbol.encode()
        cdef const symbol_entry_t *entry = find_symbol(&self.table, name, len(name))
        return None if entry == NULL else entry.symbol_id

    def name(self, int symbol_id):
        """Return the symbol of an id; IndexError if there is none."""
        _require_id(self._names, symbol_id)
        return self._names[symbol_id]

    def utf8(self, int symbol_id):
        """Return the UTF-8 bytes of the symbol of an id; IndexError if there is none."""
        _require_id(self._names, symbol_id)
        return self._utf8[symbol_id]

    cdef int _grow(self) except -1:
        cdef uint32_t count = 2 * (self.table.mask + 1)
        cdef symbol_entry_t *slots = <symbol_entry_t *>calloc(count, sizeof(symbol_entry_t))
        if slots == NULL:
            raise MemoryError
        free(self.table.slots)
        self.table.slots = slots
        self.table.mask = count - 1
        for symbol_id, name in enumerate(self._utf8):
            self._insert(name, len(name), symbol_id)
        return 0

    cdef void _insert(self, const char *name, Py_ssize_t size, int symbol_id) noexcept:
        cdef symbol_entry_t entry
        cdef uint32_t i
        cdef Py_ssize_t k
        memset(&entry, 0, sizeof(entry))
        entry.size = <uint16_t>size
        entry.symbol_id = symbol_id
        memcpy(entry.name, name, size)
        for k in range(size):
            # Stream names are lower case in ASCII letters only; other bytes stay as they are.
            entry.lower[k] = name[k] + 32 if 65 <= name[k] <= 90 else name[k]
        i = hash_name(entry.name, size) & self.table.mask
        while self.table.slots[i].size:
            i = (i + 1) & self.table.mask
        self.table.slots[i] = entry
