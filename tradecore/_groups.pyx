"""Streams that somebody wants, and the groups of clients that want the same of them."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy


cdef enum:
    LATE_RUNS = 64
    # A buffer that grew beyond is given back at the end of the round.
    KEEP_BYTES = 262144


cdef class Stream:
    """One stream that somebody wants."""

    cdef int add(self, Group group) except -1:
        """Note that this group wants it."""
        cdef Py_ssize_t place = len(self.groups)
        while place > 0 and (<Group>self.groups[place - 1]).mode > group.mode:
            place -= 1
        self.groups.insert(place, group)
        return 0

    cdef bint is_first(self, int64_t trade_id) except -1:
        """Tell whether a trade was not sent yet, and note that it is now.

        The capture forgets late ids in the middle of a hole, so that they may come from it twice.
        """
        if trade_id > self.last_id:
            self.last_id = trade_id
            return True
        for run in self.late:
            if run[0] <= trade_id <= run[1]:
                return False
        for run in self.late:
            if trade_id == run[1] + 1:
                run[1] = trade_id
                return True
        self.late.append([trade_id, trade_id])
        if len(self.late) > LATE_RUNS:
            del self.late[0]
        return True


cdef class Group:
    """Clients with the same streams and mode, and the frames of this round for them."""

    def __dealloc__(self):
        free(self.data)
        free(self.marks)

    cdef int append(self, const char *frame, Py_ssize_t size, Stream state, bint final) except -1:
        """Add a frame; `state` is its stream where a newer one may take the place of an older one,
        and `final` tells that none may take the place of this one."""
        cdef char *data
        cdef mark_t *marks
        cdef Py_ssize_t capacity
        if self.size + size > self.capacity:
            capacity = max(2 * self.capacity, self.size + size, 4096)
            data = <char *>realloc(self.data, capacity)
            if data == NULL:
                raise MemoryError
            self.data = data
            self.capacity = capacity
        if state is not None:
            if self.mark_count == self.mark_capacity:
                capacity = max(2 * self.mark_capacity, 8)
                marks = <mark_t *>realloc(self.marks, capacity * sizeof(mark_t))
                if marks == NULL:
                    raise MemoryError
                self.marks = marks
                self.mark_capacity = capacity
            self.marks[self.mark_count].start = self.size
            self.marks[self.mark_count].end = self.size + size
            self.marks[self.mark_count].stream = <void *>state
            self.marks[self.mark_count].final = final
            self.mark_count += 1
        memcpy(self.data + self.size, frame, size)
        self.size += size
        return 0

    cdef bytes whole(self):
        """Return all frames of this round."""
        if self._whole is None:
            self._whole = PyBytes_FromStringAndSize(self.data, self.size)
        return self._whole

    cdef int split(self) except -1:
        """Part the frames of this round: those that everybody gets, by stream how many states there
        are and the latest of them, and how many there were before a final one that came."""
        cdef Py_ssize_t i
        cdef Py_ssize_t done = 0
        cdef mark_t *mark
        if self.states is not None:
            return 0
        final = []
        states = {}
        ended = {}
        for i in range(self.mark_count):
            mark = &self.marks[i]
            if mark.final:
                count, _ = states.pop(<Stream>mark.stream, (0, None))
                ended[<Stream>mark.stream] = ended.get(<Stream>mark.stream, 0) + count
                continue
            final.append(self.data[done:mark.start])
            count, _ = states.get(<Stream>mark.stream, (0, None))
            states[<Stream>mark.stream] = (count + 1, self.data[mark.start:mark.end])
            done = mark.end
        final.append(self.data[done:self.size])
        self.final = b"".join(final)
        self.states = states
        self.ended = ended
        return 0

    cdef int clear(self) except -1:
        self.size = 0
        self.mark_count = 0
        self._whole = self.final = self.states = self.ended = None
        if self.capacity > KEEP_BYTES:
            free(self.data)
            self.data = NULL
            self.capacity = 0
        return 0
