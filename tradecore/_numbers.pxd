# Inline readers of the digits, times and decimals of the venue's frames.
#
# A decimal is taken when value * 10^8 is an integer that fits its column; it is never rounded.
# Times lie within 2000-01-01 .. 2100-01-01; one above 1e14 is microseconds, else milliseconds.
from libc.stdint cimport int64_t, uint64_t

from tradecore._event cimport BAD_NUMBER, BAD_TIME, NEGATIVE, OUT_OF_RANGE
from tradecore._rows cimport decimal128_t
from tradecore._words cimport digits8, likely, value8


cdef extern from * nogil:
    """
    #include <stdint.h>
    typedef unsigned __int128 tc_uint128;

    #define TC_TIME_MIN_US 946684800000000LL
    #define TC_TIME_MAX_US 4102444800000000LL
    #define TC_MICROSECONDS_FROM 100000000000000LL
    /* int64 at scale 1e-8 ends at 92233720368.54775807. */
    #define TC_MAX_WHOLE 92233720368ULL
    #define TC_MAX_FRACTION 54775807ULL

    static const uint64_t TC_POW10[9] = {
        1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000
    };
    """
    ctypedef unsigned long long uint128_t "tc_uint128"
    const int64_t TIME_MIN_US "TC_TIME_MIN_US"
    const int64_t TIME_MAX_US "TC_TIME_MAX_US"
    const int64_t MICROSECONDS_FROM "TC_MICROSECONDS_FROM"
    const uint64_t MAX_WHOLE "TC_MAX_WHOLE"
    const uint64_t MAX_FRACTION "TC_MAX_FRACTION"
    const uint64_t POW10 "TC_POW10"[9]


cdef inline int to_us(int64_t value, int64_t *out) noexcept nogil:
    """Bring a venue time in ms or us to us."""
    if value <= MICROSECONDS_FROM:
        if value < 0:
            return BAD_TIME
        value *= 1000
    if not TIME_MIN_US <= value < TIME_MAX_US:
        return BAD_TIME
    out[0] = value
    return 1


cdef inline const char *fast_uint(const char *p, int64_t *out) noexcept nogil:
    """Read 1..18 digits without a leading zero; NULL if it is anything else.

    Reads up to 24 bytes from `p`; the caller has checked that they are there.
    """
    cdef uint64_t digits
    cdef uint64_t value
    cdef int count = digits8(p, &digits)
    if count == 0 or (p[0] == b"0" and count > 1):
        return NULL
    value = value8(digits, count)
    if count == 8:
        p += 8
        count = digits8(p, &digits)
        if count:
            value = value * POW10[count] + value8(digits, count)
            if count == 8:
                p += 8
                count = digits8(p, &digits)
                if count > 2:
                    return NULL
                if count:
                    value = value * POW10[count] + value8(digits, count)
    out[0] = <int64_t>value
    return p + count


cdef inline const char *fast_time(const char *p, int64_t *out) noexcept nogil:
    """Read a time of 13 or 16 digits as all of today are: in ms or us; NULL if it is not."""
    cdef uint64_t high
    cdef uint64_t low
    cdef int64_t value
    cdef int count
    if digits8(p, &high) != 8 or p[0] == b"0":
        return NULL
    count = digits8(p + 8, &low)
    # A length that is compared is guessed ahead; one that is added to `p` must be waited for.
    if likely(count == 5):
        value = <int64_t>(value8(high, 8) * POW10[5] + value8(low, 5))
        p += 13
    elif count == 8:
        value = <int64_t>(value8(high, 8) * POW10[8] + value8(low, 8))
        p += 16
    else:
        return NULL
    return p if to_us(value, out) > 0 else NULL


cdef inline const char *fast_e8(const char *p, int64_t *out) noexcept nogil:
    """Read digits '.' 1..8 digits as an int64 at scale 1e-8; NULL if it is anything else.

    Reads up to 24 bytes from `p`; the caller has checked that they are there.
    """
    cdef uint64_t digits
    cdef uint64_t whole
    cdef uint64_t fraction
    cdef const char *end
    cdef int count = digits8(p, &digits)
    if count == 0:
        return NULL
    whole = value8(digits, count)
    p += count
    if count == 8 and p[0] != b".":
        count = digits8(p, &digits)
        if count > 3 or count == 0:
            return NULL
        whole = whole * POW10[count] + value8(digits, count)
        p += count
    if p[0] != b".":
        return NULL
    p += 1
    count = digits8(p, &digits)
    if count == 0:
        return NULL
    if likely(count == 8):
        # As in `fast_time`: the usual length is guessed ahead.
        fraction = value8(digits, 8)
        end = p + 8
    else:
        fraction = value8(digits, count) * POW10[8 - count]
        end = p + count
    if whole >= MAX_WHOLE and (whole > MAX_WHOLE or fraction > MAX_FRACTION):
        return NULL
    out[0] = <int64_t>(whole * POW10[8] + fraction)
    return end


cdef inline int decimal128(
    const char *p, const char *end, bint signed_, decimal128_t *out
) noexcept nogil:
    """Read the whole of p..end as a decimal at scale 1e-8 that fits NUMERIC(38, 8)."""
    cdef uint128_t value = 0
    cdef bint negative = False
    cdef bint overflow = False
    cdef int whole_digits = 0
    cdef int places = 0
    if p < end and p[0] == b"-":
        negative = True
        p += 1
    if p == end or not b"0" <= p[0] <= b"9":
        return BAD_NUMBER
    while p < end and b"0" <= p[0] <= b"9":
        if whole_digits or p[0] != b"0":
            whole_digits += 1
        if whole_digits <= 30:
            value = value * 10 + <uint128_t>(p[0] - 48)
        else:
            overflow = True
            whole_digits = 31
        p += 1
    if p < end:
        if p[0] != b".":
            return BAD_NUMBER
        p += 1
        if p == end:
            return BAD_NUMBER
        while p < end:
            if not b"0" <= p[0] <= b"9":
                return BAD_NUMBER
            if places < 8:
                value = value * 10 + <uint128_t>(p[0] - 48)
                places += 1
            elif p[0] != b"0":
                overflow = True
            p += 1
    if overflow:
        return OUT_OF_RANGE
    value *= <uint128_t>POW10[8 - places]
    if negative and value != 0:
        if not signed_:
            return NEGATIVE
        value = ~value + 1
    out.lo = <uint64_t>value
    out.hi = <int64_t>(value >> 64)
    return 1
