# A strict JSON reader (RFC 8259) for one object of bounded depth, without allocation.
from libc.stdint cimport uint8_t

cdef enum:
    KIND_NONE = 0
    KIND_STRING = 1
    KIND_NUMBER = 2
    KIND_BOOL = 3
    KIND_OBJECT = 4
    KIND_OTHER = 5

    # Keys that are needed have one ASCII character, which is their index, or are one of these.
    KEY_STREAM = 128
    KEY_DATA = 129
    KEY_RESULT = 130
    KEY_ERROR = 131
    KEY_CODE = 132
    KEY_ID = 133
    KEY_COUNT = 134

    # Longest string that is looked at after its escapes are resolved.
    TEXT_MAX = 256

# A value's bytes; for strings what stands between the quotes.
ctypedef struct value_t:
    const char *start
    const char *end
    uint8_t kind
    uint8_t escaped
    uint8_t doubled

# The values of an object by key.
ctypedef struct object_t:
    value_t values[KEY_COUNT]

cdef bint valid_utf8(const char *data, Py_ssize_t size) noexcept nogil
cdef bint read_object(const char *start, const char *end, object_t *found) noexcept nogil
cdef const char *text_of(const value_t *value, char *scratch, Py_ssize_t *size) noexcept nogil
cdef bint text_equals(const value_t *value, const char *literal, Py_ssize_t size) noexcept nogil
