"""A strict JSON reader for the slow path: it checks all of an object and notes where values stand.

A value's numbers and escapes are resolved by those who need them; nothing is copied before.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memcmp


cdef enum:
    MAX_DEPTH = 64

ctypedef struct cursor_t:
    const char *p
    const char *end


cdef bint valid_utf8(const char *data, Py_ssize_t size) noexcept nogil:
    """Check UTF-8 as RFC 3629 has it: no overlong forms, no surrogates, at most U+10FFFF."""
    cdef const uint8_t *p = <const uint8_t *>data
    cdef const uint8_t *end = p + size
    cdef uint8_t c
    cdef int more
    cdef uint32_t point
    cdef uint32_t least
    while p < end:
        c = p[0]
        p += 1
        if c < 0x80:
            continue
        if 0xC2 <= c <= 0xDF:
            more, point, least = 1, c & 0x1F, 0x80
        elif 0xE0 <= c <= 0xEF:
            more, point, least = 2, c & 0x0F, 0x800
        elif 0xF0 <= c <= 0xF4:
            more, point, least = 3, c & 0x07, 0x10000
        else:
            return False
        if end - p < more:
            return False
        while more:
            if p[0] & 0xC0 != 0x80:
                return False
            point = point << 6 | (p[0] & 0x3F)
            p += 1
            more -= 1
        if point < least or point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
            return False
    return True


cdef inline void _skip_space(cursor_t *c) noexcept nogil:
    while c.p < c.end and (
        c.p[0] == b" " or c.p[0] == b"\t" or c.p[0] == b"\n" or c.p[0] == b"\r"
    ):
        c.p += 1


cdef inline bint _take(cursor_t *c, char byte) noexcept nogil:
    if c.p < c.end and c.p[0] == byte:
        c.p += 1
        return True
    return False


cdef inline int _hex4(const char *p) noexcept nogil:
    """Value of four hex digits, -1 if they are not."""
    cdef int value = 0
    cdef int i
    cdef char ch
    for i in range(4):
        ch = p[i]
        if b"0" <= ch <= b"9":
            value = value * 16 + ch - 48
        elif b"a" <= ch <= b"f":
            value = value * 16 + ch - 87
        elif b"A" <= ch <= b"F":
            value = value * 16 + ch - 55
        else:
            return -1
    return value


cdef bint _scan_string(cursor_t *c, value_t *value) noexcept nogil:
    """Step over a string; the cursor stands on its opening quote."""
    cdef uint8_t byte
    if not _take(c, b'"'):
        return False
    value.kind = KIND_STRING
    value.start = c.p
    value.escaped = 0
    while c.p < c.end:
        byte = <uint8_t>c.p[0]
        if byte == b'"':
            value.end = c.p
            c.p += 1
            return True
        if byte < 0x20:
            return False
        c.p += 1
        if byte != b"\\":
            continue
        value.escaped = 1
        if c.p >= c.end:
            return False
        byte = <uint8_t>c.p[0]
        c.p += 1
        if byte == b"u":
            if c.end - c.p < 4 or _hex4(c.p) < 0:
                return False
            c.p += 4
        elif not (byte == b'"' or byte == b"\\" or byte == b"/" or byte == b"b" or byte == b"f"
                  or byte == b"n" or byte == b"r" or byte == b"t"):
            return False
    return False


cdef inline bint _scan_digits(cursor_t *c) noexcept nogil:
    cdef const char *start = c.p
    while c.p < c.end and b"0" <= c.p[0] <= b"9":
        c.p += 1
    return c.p > start


cdef bint _scan_number(cursor_t *c) noexcept nogil:
    _take(c, b"-")
    if not _take(c, b"0") and not _scan_digits(c):
        return False
    if _take(c, b".") and not _scan_digits(c):
        return False
    if _take(c, b"e") or _take(c, b"E"):
        if not _take(c, b"+"):
            _take(c, b"-")
        return _scan_digits(c)
    return True


cdef inline bint _scan_word(cursor_t *c, const char *word, Py_ssize_t size) noexcept nogil:
    if c.end - c.p < size or memcmp(c.p, word, size) != 0:
        return False
    c.p += size
    return True


cdef bint _scan_value(cursor_t *c, int depth, value_t *value) noexcept nogil:
    """Step over any JSON value and note where it stands."""
    cdef char first
    cdef value_t inner
    if c.p >= c.end or depth > MAX_DEPTH:
        return False
    first = c.p[0]
    if first == b'"':
        return _scan_string(c, value)
    value.start = c.p
    value.escaped = 0
    if first == b"{":
        value.kind = KIND_OBJECT
        if not _scan_object(c, depth, NULL):
            return False
    elif first == b"[":
        value.kind = KIND_OTHER
        c.p += 1
        _skip_space(c)
        if not _take(c, b"]"):
            while True:
                _skip_space(c)
                if not _scan_value(c, depth + 1, &inner):
                    return False
                _skip_space(c)
                if _take(c, b"]"):
                    break
                if not _take(c, b","):
                    return False
    elif first == b"t":
        value.kind = KIND_BOOL
        if not _scan_word(c, b"true", 4):
            return False
    elif first == b"f":
        value.kind = KIND_BOOL
        if not _scan_word(c, b"false", 5):
            return False
    elif first == b"n":
        value.kind = KIND_OTHER
        if not _scan_word(c, b"null", 4):
            return False
    else:
        value.kind = KIND_NUMBER
        if not _scan_number(c):
            return False
    value.end = c.p
    return True


cdef bint _scan_object(cursor_t *c, int depth, object_t *found) noexcept nogil:
    """Step over an object; with `found`, note the values of the keys that events use."""
    cdef value_t key
    cdef value_t value
    cdef int index
    if depth > MAX_DEPTH or not _take(c, b"{"):
        return False
    _skip_space(c)
    if _take(c, b"}"):
        return True
    while True:
        _skip_space(c)
        if not _scan_string(c, &key):
            return False
        _skip_space(c)
        if not _take(c, b":"):
            return False
        _skip_space(c)
        value.doubled = 0
        if not _scan_value(c, depth + 1, &value):
            return False
        if found != NULL:
            index = _key_index(&key)
            if index >= 0:
                value.doubled = found.values[index].kind != KIND_NONE
                found.values[index] = value
        _skip_space(c)
        if _take(c, b"}"):
            return True
        if not _take(c, b","):
            return False


cdef bint read_object(const char *start, const char *end, object_t *found) noexcept nogil:
    """Read start..end, which must be one object and white space, into `found`.

    False when it is anything else; values are then not to be used. Of a doubled key the last
    value is kept and marked.
    """
    cdef cursor_t c
    cdef int i
    for i in range(KEY_COUNT):
        found.values[i].kind = KIND_NONE
    c.p = start
    c.end = end
    _skip_space(&c)
    if not _scan_object(&c, 0, found):
        return False
    _skip_space(&c)
    return c.p == c.end


cdef Py_ssize_t _unescape(const value_t *value, char *out, Py_ssize_t room) noexcept nogil:
    """Resolve a string's escapes into `out` as UTF-8; -1 when it does not fit or is no text."""
    cdef const char *p = value.start
    cdef Py_ssize_t size = 0
    cdef int point
    cdef int low
    cdef char ch
    while p < value.end:
        # At most four bytes are written below.
        if size + 4 > room:
            return -1
        if p[0] != b"\\":
            out[size] = p[0]
            size += 1
            p += 1
            continue
        ch = p[1]
        p += 2
        if ch != b"u":
            if ch == b"b":
                ch = 8
            elif ch == b"f":
                ch = 12
            elif ch == b"n":
                ch = 10
            elif ch == b"r":
                ch = 13
            elif ch == b"t":
                ch = 9
            out[size] = ch
            size += 1
            continue
        point = _hex4(p)
        p += 4
        if 0xD800 <= point <= 0xDFFF:
            if point > 0xDBFF or value.end - p < 6 or p[0] != b"\\" or p[1] != b"u":
                return -1
            low = _hex4(p + 2)
            if not 0xDC00 <= low <= 0xDFFF:
                return -1
            p += 6
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
        if point < 0x80:
            out[size] = <char>point
            size += 1
        elif point < 0x800:
            out[size] = <char>(0xC0 | point >> 6)
            out[size + 1] = <char>(0x80 | point & 0x3F)
            size += 2
        elif point < 0x10000:
            out[size] = <char>(0xE0 | point >> 12)
            out[size + 1] = <char>(0x80 | point >> 6 & 0x3F)
            out[size + 2] = <char>(0x80 | point & 0x3F)
            size += 3
        else:
            out[size] = <char>(0xF0 | point >> 18)
            out[size + 1] = <char>(0x80 | point >> 12 & 0x3F)
            out[size + 2] = <char>(0x80 | point >> 6 & 0x3F)
            out[size + 3] = <char>(0x80 | point & 0x3F)
            size += 4
    return size


cdef const char *text_of(const value_t *value, char *scratch, Py_ssize_t *size) noexcept nogil:
    """A string's text: its own bytes, or `scratch` (TEXT_MAX bytes) when it has escapes."""
    if not value.escaped:
        size[0] = value.end - value.start
        return value.start
    size[0] = _unescape(value, scratch, TEXT_MAX)
    return NULL if size[0] < 0 else scratch


cdef bint text_equals(const value_t *value, const char *literal, Py_ssize_t size) noexcept nogil:
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t length
    cdef const char *text = text_of(value, scratch, &length)
    return text != NULL and length == size and memcmp(text, literal, size) == 0


cdef int _key_index(const value_t *key) noexcept nogil:
    """Slot of a key in object_t; -1 for a key that no event uses."""
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t size
    cdef const char *text = text_of(key, scratch, &size)
    if text == NULL:
        return -1
    if size == 1:
        return text[0] if text[0] > 0 else -1
    if size == 6:
        if memcmp(text, b"stream", 6) == 0:
            return KEY_STREAM
        if memcmp(text, b"result", 6) == 0:
            return KEY_RESULT
    if size == 4:
        if memcmp(text, b"data", 4) == 0:
            return KEY_DATA
        if memcmp(text, b"code", 4) == 0:
            return KEY_CODE
    if size == 5 and memcmp(text, b"error", 5) == 0:
        return KEY_ERROR
    if size == 2 and memcmp(text, b"id", 2) == 0:
        return KEY_ID
    return -1
