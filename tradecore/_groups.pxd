# A round's frames for clients that want the same.
from libc.stdint cimport int64_t, uint32_t

# A frame of a stream of states in a group's buffer. A slow client need not get it, unless it is
# final: then it stands for the states before it.
ctypedef struct mark_t:
    Py_ssize_t start
    Py_ssize_t end
    void *stream
    bint final


cdef class Group


cdef class Stream:
    cdef str name
    cdef bytes wire_name
    cdef int kind
    cdef uint32_t symbol_id
    # Those with the same mode stand together.
    cdef list groups
    # Trades: the greatest id sent, and the runs of late ids below it.
    cdef int64_t last_id
    cdef list late

    cdef int add(self, Group group) except -1
    cdef bint is_first(self, int64_t trade_id) except -1


cdef class Group:
    cdef object key
    cdef int mode
    cdef list clients
    cdef list streams
    cdef char *data
    cdef Py_ssize_t size
    cdef Py_ssize_t capacity
    cdef mark_t *marks
    cdef Py_ssize_t mark_count
    cdef Py_ssize_t mark_capacity
    # Made when a client needs them, once a round.
    cdef bytes _whole
    cdef bytes final
    cdef dict states
    cdef dict ended

    cdef int append(self, const char *frame, Py_ssize_t size, Stream state, bint final) except -1
    cdef bytes whole(self)
    cdef int split(self) except -1
    cdef int clear(self) except -1
