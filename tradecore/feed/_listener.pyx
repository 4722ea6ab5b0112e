"""The WebSocket listener of a venue connection: frames in C, straight into the capture.

Everything that is not a data frame is rare and goes to the owner, a `session.Session`:
`on_connected(transport)`, `on_disconnected(transport)`, `on_control(payload)`,
`on_server_shutdown(event_us)`, `on_pong()`.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t

from picows import WSProtocolError

from picows.picows cimport WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from tradecore._arrivals cimport Arrivals, last_told
from tradecore._event cimport (
    BINARY,
    EVENT_CONTROL,
    EVENT_KLINE,
    EVENT_SHUTDOWN,
    EVENT_TICKER,
    EVENT_TRADE,
    OVERSIZED,
    event_t,
)
from tradecore.capture cimport Capture, mono_clock_ns, wall_clock_ns
from tradecore.sequence cimport FAR_BELOW


cdef Py_ssize_t MAX_MESSAGE = 1 << 20

MAX_MESSAGE_BYTES = MAX_MESSAGE
"""A longer message is counted as oversized and not looked at."""


cdef class FrameListener(WSListener):
    """Takes the frames of one connection; `line` and `epoch` are stamped on its rows."""

    cdef Capture _capture
    cdef object _owner
    cdef Arrivals _arrivals
    cdef uint16_t _line
    cdef uint32_t _epoch
    cdef int64_t _recv_ns
    cdef bint _had_data
    # A message that comes in several fragments is put together here.
    cdef bytearray _message
    cdef bint _fragmented
    cdef bint _fragments_oversized
    cdef WSMsgType _fragments_type
    cdef readonly int64_t last_data_ns
    cdef readonly int64_t data_frames
    cdef readonly int64_t pongs

    def __init__(self, Capture capture not None, owner, uint16_t line, uint32_t epoch):
        self._capture = capture
        self._owner = owner
        self._line = line
        self._epoch = epoch
        self._arrivals = capture.open_arrivals()

    def unconfirmed(self, symbol_ids):
        """Return those of `symbol_ids` that this connection has not yet been seen to continue:
        closing the others that carry them may cost trades.

        A trade of this connection confirms when the id before it has come too, a ticker or kline
        when the last trade id that it tells has come. Raises IndexError for a symbol unknown to
        the capture.
        """
        return self._capture.unconfirmed(self._arrivals, symbol_ids)

    def mark(self):
        """Note how far all symbols are: this connection owes what moves from now on."""
        self._capture.mark(self._arrivals)

    def left_out(self, symbol_ids):
        """Return those of `symbol_ids` that have moved since the mark, by what others brought or
        a ticker or kline of this connection told, while no trade of theirs came over it."""
        return self._capture.left_out(self._arrivals, symbol_ids)

    def behind(self, symbol_ids):
        """Return (symbol id, last trade id from here, newest known) of those of `symbol_ids` of
        which others brought newer trades, or newer ones were told here, since the mark."""
        return self._capture.behind(self._arrivals, symbol_ids)

    cpdef on_ws_connected(self, WSTransport transport):
        self._owner.on_connected(transport)

    cpdef on_ws_disconnected(self, WSTransport transport):
        self._capture.close_arrivals(self._arrivals)
        self._owner.on_disconnected(transport)

    cpdef on_ws_frame(self, WSTransport transport, WSFrame frame):
        cdef bint last = frame.last_in_buffer
        if self._recv_ns == 0:
            # One reading of the clock per socket read, when its first frame comes.
            self._recv_ns = wall_clock_ns()
        if (
            frame.msg_type == WSMsgType.TEXT
            and frame.fin
            and not self._fragmented
            and not frame.rsv1 | frame.rsv2 | frame.rsv3
        ):
            self._take(frame.payload_ptr, frame.payload_size)
        else:
            self._on_other_frame(transport, frame)
        if last:
            self._recv_ns = 0
            if self._had_data:
                self._had_data = False
                self.last_data_ns = mono_clock_ns()
            self._capture.end_of_read()

    cdef int _take(self, const char *data, Py_ssize_t size) except -1:
        """Hand a whole text message to the capture."""
        cdef int status
        if size > MAX_MESSAGE:
            self._capture.refuse(OVERSIZED, data, size)
            return 0
        status = self._capture.ingest(data, size, self._recv_ns, self._line, self._epoch)
        if status >= EVENT_TRADE and status < EVENT_SHUTDOWN:
            self.data_frames += 1
            self._had_data = True
            self._note(status, &self._capture._event)
        elif status == EVENT_CONTROL:
            self._owner.on_control(data[:size])
        elif status == EVENT_SHUTDOWN:
            self._owner.on_server_shutdown(self._capture._event.event_us)
        return 0

    cdef void _note(self, int status, const event_t *event) noexcept:
        """Note what this connection has shown of a symbol."""
        if status == EVENT_TRADE:
            if self._capture._verdict != FAR_BELOW:
                self._arrivals.trade(event.trade.symbol_id, event.trade.trade_id)
        elif status == EVENT_TICKER:
            self._arrivals.told(
                event.ticker.symbol_id, last_told(event.ticker.last_id, event.ticker.trade_count)
            )
        elif status == EVENT_KLINE:
            self._arrivals.told(
                event.kline.symbol_id, last_told(event.kline.last_id, event.kline.trade_count)
            )

    cdef int _on_other_frame(self, WSTransport transport, WSFrame frame) except -1:
        cdef WSMsgType kind = frame.msg_type
        if frame.rsv1 | frame.rsv2 | frame.rsv3:
            # Compressed, or another extension: none was offered (RFC 6455, 5.2).
            raise WSProtocolError(WSCloseCode.PROTOCOL_ERROR, "reserved bits are set")
        if kind == WSMsgType.PING:
            # At once and without waiting for anything: the venue cuts who is late.
            transport.send_pong(frame.get_payload_as_bytes())
        elif kind == WSMsgType.PONG:
            self.pongs += 1
            self._owner.on_pong()
        elif kind == WSMsgType.CLOSE:
            # A close without a code reads as 0, which must not go on the wire (RFC 6455, 7.4.1).
            transport.send_close(frame.get_close_code() or WSCloseCode.OK)
            transport.disconnect()
        elif kind == WSMsgType.CONTINUATION:
            if not self._fragmented:
                raise WSProtocolError(
                    WSCloseCode.PROTOCOL_ERROR, "continuation frame without a message"
                )
            self._add_fragment(frame)
        elif kind == WSMsgType.TEXT or kind == WSMsgType.BINARY:
            if self._fragmented:
                raise WSProtocolError(
                    WSCloseCode.PROTOCOL_ERROR, "new message inside a fragmented one"
                )
            if frame.fin:
                self._capture.refuse(BINARY, frame.payload_ptr, frame.payload_size)
                return 0
            self._message = bytearray()
            self._fragmented = True
            self._fragments_oversized = False
            self._fragments_type = kind
            self._add_fragment(frame)
        return 0

    cdef int _add_fragment(self, WSFrame frame) except -1:
        cdef bytes message
        if len(self._message) + frame.payload_size > MAX_MESSAGE:
            # Nothing of it is kept but the head for the log.
            self._fragments_oversized = True
            del self._message[120:]
        if not self._fragments_oversized:
            self._message += frame.payload_ptr[:frame.payload_size]
        if not frame.fin:
            return 0
        message = bytes(self._message)
        self._message = None
        self._fragmented = False
        if self._fragments_oversized:
            self._capture.refuse(OVERSIZED, message, len(message))
        elif self._fragments_type == WSMsgType.BINARY:
            self._capture.refuse(BINARY, message, len(message))
        else:
            self._take(message, len(message))
        return 0
