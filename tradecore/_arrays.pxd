# What a numpy array of rows is in C: its bytes, checked.
from libc.stdint cimport uint8_t


cdef inline const uint8_t[::1] bytes_of(rows, dtype):
    """The bytes of a one-dimensional contiguous array of `dtype`."""
    if rows.dtype is not dtype and rows.dtype != dtype:
        raise TypeError(f"rows of {rows.dtype} are not rows of {dtype}")
    if rows.ndim != 1 or not rows.flags.c_contiguous:
        raise ValueError("rows are not one contiguous run")
    return rows.view("u1")


cdef inline const uint8_t[::1] flags_of(keep, Py_ssize_t count):
    """A flag for each of `count` rows; None stays None."""
    if keep is None:
        return None
    cdef const uint8_t[::1] view = keep.view("u1")
    if view.shape[0] != count:
        raise ValueError(f"{view.shape[0]} flags for {count} rows")
    return view
