# Bytes of a frame read eight at a time. The caller has checked that the bytes read are there.
from libc.stdint cimport uint32_t, uint64_t


cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>

    #define TC_LIKELY(x) __builtin_expect(!!(x), 1)

    static inline uint64_t tc_load8(const char *p) {
        uint64_t word;
        memcpy(&word, p, 8);
        return word;
    }
    /* The first `size` (at least 1) of 8 bytes, zeros behind them (little endian). */
    static inline uint64_t tc_first8(const char *p, Py_ssize_t size) {
        return tc_load8(p) & (size >= 8 ? ~0ULL : ~0ULL >> (64 - 8 * size));
    }
    /* Where `byte` first stands in 48 bytes; 48 if it does not. */
    static inline Py_ssize_t tc_find48(const char *p, char byte) {
        const uint64_t ones = 0x0101010101010101ULL;
        for (Py_ssize_t at = 0; at < 48; at += 8) {
            uint64_t x = tc_load8(p + at) ^ ones * (unsigned char)byte;
            uint64_t zero = (x - ones) & ~x & 0x8080808080808080ULL;
            if (zero)
                return at + (__builtin_ctzll(zero) >> 3);
        }
        return 48;
    }
    /* How many of the 8 bytes, from the first, are ASCII digits; `digits` gets their values. */
    static inline int tc_digits8(const char *p, uint64_t *digits) {
        uint64_t x = tc_load8(p) ^ 0x3030303030303030ULL;
        uint64_t other = ((x + 0x7676767676767676ULL) | x) & 0x8080808080808080ULL;
        *digits = x;
        return other ? __builtin_ctzll(other) >> 3 : 8;
    }
    /* Value of the first `count` (1..8) digits of a word from tc_digits8 (little endian). */
    static inline uint64_t tc_value8(uint64_t digits, int count) {
        digits <<= 64 - 8 * count;
        digits = digits * 10 + (digits >> 8);
        return (((digits & 0x000000FF000000FFULL) * 0x000F424000000064ULL)
              + (((digits >> 16) & 0x000000FF000000FFULL) * 0x0000271000000001ULL)) >> 32;
    }
    /* Length of the `true` (`*value` 1) or `false` (0) that stands here, 0 if neither does. Reads
       5 bytes and does not branch on which: the side of a trade is as good as random. */
    static inline int tc_bool(const char *p, uint32_t *value) {
        uint32_t is_true = *p == 't';
        uint32_t rest;
        memcpy(&rest, p + !is_true, 4);
        *value = is_true;
        return rest == (0x65736c61u ^ (0x65757274u ^ 0x65736c61u) * is_true)
            && (uint32_t)*p == 'f' + ('t' - 'f') * is_true ? (int)(5 - is_true) : 0;
    }
    """
    bint likely "TC_LIKELY"(bint condition) noexcept
    uint64_t first8 "tc_first8"(const char *p, Py_ssize_t size) noexcept
    int read_bool "tc_bool"(const char *p, uint32_t *value) noexcept
    Py_ssize_t find48 "tc_find48"(const char *p, char byte) noexcept
    int digits8 "tc_digits8"(const char *p, uint64_t *digits) noexcept
    uint64_t value8 "tc_value8"(uint64_t digits, int count) noexcept
