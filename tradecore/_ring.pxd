# The hot side of the ring: claim a slot, fill it, publish it. Inline, so that capture pays no call.
from cython cimport final
from libc.stdint cimport int64_t, uint16_t, uint32_t

from tradecore._rows cimport trade_row_t


cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>

    static inline uint64_t tc_mix(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    /* Eight bytes as one word in a register: GCC would load pairs of them as a vector, and the
       processor waits when it reads at once what was written just now in smaller pieces. */
    static inline uint64_t tc_word(const char *p) {
        uint64_t word;
        memcpy(&word, p, 8);
        __asm__("" : "+r"(word));
        return word;
    }
    /* symbol_id, flags and line in one store, for the same reason (little endian). */
    static inline void tc_put_tag(uint32_t *symbol_id, uint16_t flags, uint16_t line, uint32_t id) {
        uint64_t word = (uint64_t)line << 48 | (uint64_t)flags << 32 | id;
        memcpy(symbol_id, &word, 8);
    }
    /* Over the 60 bytes before the checksum; not cryptographic, it only has to see torn rows. */
    static inline uint32_t tc_row_checksum(const void *row) {
        const char *p = (const char *)row;
        uint32_t tail;
        uint64_t h;
        memcpy(&tail, p + 56, 4);
        h = tc_mix(tc_word(p) ^ 0xa0761d6478bd642fULL, tc_word(p + 8) ^ 0xe7037ed1a0b428dbULL)
          ^ tc_mix(tc_word(p + 16) ^ 0x8ebc6af09c88c6e3ULL, tc_word(p + 24) ^ 0x589965cc75374cc3ULL)
          ^ tc_mix(tc_word(p + 32) ^ 0x1d8e4e27c47d124fULL, tc_word(p + 40) ^ 0xeb44accab455d165ULL)
          ^ tc_mix(tc_word(p + 48) ^ 0x2f9be6cc5be4f515ULL, tail ^ 0x9c06faf4d023e3abULL);
        return (uint32_t)(h ^ (h >> 32));
    }
    /* The compiler must not move the stores of a row behind the store that makes it visible. */
    #define TC_FENCE() __asm__ __volatile__("" ::: "memory")
    """
    uint32_t tc_row_checksum(const void *row)
    void put_tag "tc_put_tag"(uint32_t *symbol_id, uint16_t flags, uint16_t line, uint32_t id)
    void fence "TC_FENCE"()


cdef class RingBuffer:
    cdef object _owner
    cdef char *_start
    cdef trade_row_t *_rows
    # In the file's header, so that they outlive the process.
    cdef int64_t *_base_seq
    cdef int64_t *_durable_seq
    cdef readonly int64_t capacity
    cdef readonly int64_t published_seq
    cdef int64_t _mask
    # Up to where rows are out of our resident memory: stored ones, and a backlog's.
    cdef int64_t _trimmed_seq
    cdef int64_t _backlog_seq

    @final
    cdef inline trade_row_t *row(self, int64_t seq) noexcept nogil:
        return &self._rows[(seq - self._base_seq[0]) & self._mask]

    @final
    cdef inline trade_row_t *claim(self) noexcept nogil:
        """Return the next slot to fill, NULL when the ring is full; nothing is visible yet."""
        if self.published_seq - self._durable_seq[0] >= self.capacity:
            return NULL
        return self.row(self.published_seq)

    @final
    cdef inline void publish(self, trade_row_t *row) noexcept nogil:
        """Stamp the claimed row and make it visible to the flusher and to recovery."""
        row.sequence = self.published_seq
        row.checksum = tc_row_checksum(row)
        fence()
        self.published_seq += 1

    cdef void trim_backlog(self) noexcept
    cdef void _drop_rows(self, int64_t first_seq, int64_t last_seq) noexcept
    cdef void _drop(self, int64_t first, int64_t last) noexcept
