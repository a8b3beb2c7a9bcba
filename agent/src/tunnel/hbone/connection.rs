//! HTTP/2 as tunnels need it (RFC 9113): streams, flow control and header blocks of one connection, without its socket.
//!
//! Bytes from the socket go into [`Core::receive`], bytes for it come out of [`Core::outgoing`]; the driver moves them.
//! Records are opened and sealed where they lie: what an application sends is read from its socket into the place
//! where it is sealed and sent from, and what the peer sends is passed on as slices of what was read.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    fmt,
    io::{self, IoSliceMut},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};

use super::{
    frame::{self, Broken, Event, Parser, error},
    head::{Head, parse_head},
    hpack,
    outbox::{FULL_RECORD, LEAD, OUTBOX, Outbox, PAYLOAD, RECORDS},
    stream::{Entry, FIRST_STREAM_WINDOW, MAX_STREAM_WINDOW, Side, register},
    tls::{self, Opened, Session, TlsError},
};
use crate::tunnel::{Charge, StreamError, code};

/// Window of the connection, in bytes: the largest that RFC 9113 §6.9.1 allows, and given back on arrival.
///
/// It never binds: readers who never read hold their own windows and stall nobody else. (The reference value of 16 MiB
/// is used up by four of them.) What we hold is bounded by the streams' windows.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Below this much of it left, the connection's window is filled up. Tests do not move gigabytes.
const CONNECTION_WINDOW_LOW: i64 = if cfg!(test) { CONNECTION_WINDOW as i64 - (256 << 10) } else { 1 << 30 };
/// Streams that a client may have open (§14.3).
const MAX_STREAMS: usize = 200;
/// Streams that we keep for a client: those whose handlers are still ending count, too. A client that resets what it
/// opens gets as far as this and is refused further ones until handlers have ended.
const MAX_KEPT: usize = 2 * MAX_STREAMS;
/// Requests in a row that were refused for want of room, or reset before anybody took them, without an answer between
/// them: then the client is attacking.
const MAX_IN_VAIN: u32 = 1000;
/// Empty DATA frames in a row that we bear.
const MAX_EMPTY: u32 = 1000;
/// Most header bytes that we accept from a client, and from a server (§14.3).
const CLIENT_HEADERS: usize = 64 << 10;
const SERVER_HEADERS: usize = 16 << 10;

/// Answers that a peer can make us owe it (PING, SETTINGS, resets) before we stop reading.
const MAX_OWED: usize = 64 << 10;
/// Payload of our PING.
const PING: [u8; 8] = *b"culvert?";
/// Payload of the PING between the two GOAWAYs of an orderly end.
const LAST_PING: [u8; 8] = *b"culvert.";

/// How a connection ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// In order.
    Closed,
    /// TLS failed after the handshake, for example because the peer did not like our certificate.
    Tls(Arc<str>),
    /// The peer broke HTTP/2 or a limit.
    Protocol(Arc<str>),
    /// The socket failed, or nobody answers.
    Lost(Arc<str>),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Tls(why) => write!(f, "TLS: {why}"),
            Self::Protocol(why) => write!(f, "HTTP/2: {why}"),
            Self::Lost(why) => f.write_str(why),
        }
    }
}

/// One connection; see the module's words.
pub(super) struct Core {
    client: bool,
    tls: Session,
    outbox: Outbox,
    /// Frames that are not DATA, in the clear; sealed before the next DATA, or when the driver sends.
    control: Vec<u8>,
    parser: Parser,
    decoder: hpack::Decoder,
    /// The start of a record whose end has not come.
    partial: Vec<u8>,
    /// What of the client's preface has not come (server).
    preface: &'static [u8],
    streams: BTreeMap<u32, Entry>,
    /// Client: the next id to use. Server: the largest seen.
    last_id: u32,
    send_window: i64,
    recv_window: i64,
    first_send_window: i64,
    /// Streams that the peer takes; `None` until its SETTINGS have come.
    max_streams: Option<u32>,
    max_frame: usize,
    /// Streams that wait for room or for the connection's window, first come first served.
    waiting: VecDeque<u32>,
    /// Requests that nobody has taken (server).
    arrivals: VecDeque<(u32, Head)>,
    in_vain: u32,
    empty: u32,
    ping_sent: bool,
    /// GOAWAY came: no streams may be opened.
    goaway: bool,
    draining: bool,
    /// Set once; what is in the outbox then still goes out.
    end: Option<End>,
    driver: Option<Waker>,
}

/// A connection shared by its driver and its streams, all on one thread.
pub(super) type Shared = Rc<RefCell<Core>>;

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Core {
    pub(super) fn new(mut tls: Session, client: bool) -> Result<Shared, End> {
        let early = Bytes::from(std::mem::take(&mut tls.early));
        let unread = std::mem::take(&mut tls.unread);
        let mut control = Vec::new();
        let mut settings = vec![
            (frame::SETTING_INITIAL_WINDOW_SIZE, FIRST_STREAM_WINDOW),
            (frame::SETTING_MAX_FRAME_SIZE, frame::MAX_FRAME),
        ];
        let max_block = if client { SERVER_HEADERS } else { CLIENT_HEADERS };
        settings.push((frame::SETTING_MAX_HEADER_LIST_SIZE, max_block as u32));
        if client {
            control.extend_from_slice(PREFACE);
            settings.push((frame::SETTING_ENABLE_PUSH, 0));
        } else {
            settings.push((frame::SETTING_MAX_CONCURRENT_STREAMS, MAX_STREAMS as u32));
        }
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        frame::put(&mut control, frame::SETTINGS, 0, 0, &payload);
        let more = CONNECTION_WINDOW - 65_535;
        frame::put(&mut control, frame::WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        let mut core = Self {
            client,
            tls,
            outbox: Outbox::default(),
            control,
            parser: Parser::new(max_block),
            decoder: hpack::Decoder::default(),
            partial: Vec::new(),
            preface: if client { &[] } else { PREFACE },
            streams: BTreeMap::new(),
            last_id: if client { 1 } else { 0 },
            send_window: 65_535,
            recv_window: CONNECTION_WINDOW.into(),
            first_send_window: 65_535,
            max_streams: None,
            max_frame: tls::MAX_CONTENT,
            waiting: VecDeque::new(),
            arrivals: VecDeque::new(),
            in_vain: 0,
            empty: 0,
            ping_sent: false,
            goaway: false,
            draining: false,
            end: None,
            driver: None,
        };
        core.plaintext(early);
        core.receive(BytesMut::from(&unread[..]));
        match core.end.take() {
            Some(end @ (End::Tls(_) | End::Protocol(_))) => Err(end),
            end => {
                core.end = end;
                Ok(Rc::new(RefCell::new(core)))
            }
        }
    }

    // What the driver uses.

    pub(super) fn register_driver(&mut self, cx: &Context<'_>) {
        register(&mut self.driver, cx);
    }

    fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    /// Whether the peer owes us reading before we read more of what makes us answer.
    pub(super) fn blocked(&self) -> bool {
        self.control.len() > MAX_OWED || self.outbox.len() > OUTBOX + MAX_OWED
    }

    /// What [`receive`](Self::receive) must be given first: the start of a record.
    pub(super) fn partial(&mut self) -> &mut Vec<u8> {
        &mut self.partial
    }

    /// Takes bytes from the socket, which begin where [`partial`](Self::partial) did.
    pub(super) fn receive(&mut self, mut bytes: BytesMut) {
        let mut contents = VecDeque::new();
        let mut at = 0;
        let (mut failed, mut closed) = (None, false);
        loop {
            match tls::record_len(&bytes[at..]) {
                Ok(Some(len)) if bytes.len() - at >= len => match self.tls.open(&mut bytes[at..at + len]) {
                    Ok(opened) => {
                        match opened {
                            Opened::Data(content) => contents.push_back(at + content.start..at + content.end),
                            Opened::Internal => {}
                            Opened::Closed => {
                                closed = true;
                                break;
                            }
                        }
                        at += len;
                    }
                    Err(error) => {
                        failed = Some(error.into());
                        break;
                    }
                },
                Ok(_) => break,
                Err(error) => {
                    failed = Some(error.into());
                    break;
                }
            }
        }
        // Not kept when it is empty: idle connections hold no buffer.
        self.partial = bytes[at..].to_vec();
        let bytes = bytes.freeze();
        for content in contents {
            self.plaintext(bytes.slice(content));
        }
        if let Some(end) = failed {
            self.finish(end);
        }
        if closed {
            self.eof();
        }
        if self.tls.rekey_due(0) || !self.control.is_empty() {
            self.wake_driver();
        }
    }

    /// The socket has nothing more to read.
    pub(super) fn eof(&mut self) {
        // Whether or not close_notify came before, HTTP/2 says itself what is whole.
        let orderly = self.streams.values().all(|entry| entry.read != Side::Open);
        self.finish(if orderly { End::Closed } else { End::Lost("the peer closed the connection".into()) });
    }

    /// The connection is over, for this reason if there is none yet. What is queued may still be sent.
    pub(super) fn finish(&mut self, end: End) {
        if self.end.is_some() {
            return;
        }
        let error = StreamError::Lost(end.to_string().into());
        self.end = Some(end);
        for entry in self.streams.values_mut() {
            entry.cut(&error);
        }
        for (id, _) in self.arrivals.drain(..) {
            self.streams.remove(&id);
        }
        self.wake_driver();
    }

    pub(super) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Ends the connection with GOAWAY, which cuts off the streams that there are.
    pub(super) fn close(&mut self, code: u32, end: End) {
        if self.end.is_some() {
            return;
        }
        let last = if self.client { 0 } else { self.last_id };
        frame::put(&mut self.control, frame::GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat());
        self.finish(end);
    }

    /// The first half of an orderly end (RFC 9113 §6.8): no new streams, please; the second follows the peer's answer.
    pub(super) fn drain(&mut self) {
        if self.draining || self.end.is_some() {
            return;
        }
        self.draining = true;
        let last = 0x7fff_ffffu32.to_be_bytes();
        frame::put(&mut self.control, frame::GOAWAY, 0, 0, &[last, error::NO_ERROR.to_be_bytes()].concat());
        frame::put(&mut self.control, frame::PING, 0, 0, &LAST_PING);
        self.wake_driver();
    }

    /// Whether the orderly end has come: no streams any more, and the peer knows that it must not open any.
    pub(super) fn drained(&self) -> bool {
        self.end.is_none() && self.draining && self.goaway && !self.in_use()
    }

    /// Whether any stream is open, or still in somebody's hands.
    pub(super) fn in_use(&self) -> bool {
        !self.streams.is_empty()
    }

    pub(super) fn ping(&mut self) {
        self.ping_sent = true;
        frame::put(&mut self.control, frame::PING, 0, 0, &PING);
        self.wake_driver();
    }

    pub(super) fn ping_unanswered(&self) -> bool {
        self.ping_sent
    }

    /// The next request, if the caller may take one (server).
    pub(super) fn arrival(&mut self) -> Option<(u32, Head)> {
        self.arrivals.pop_front()
    }

    /// Nobody is there to read what we would answer.
    pub(super) fn drop_control(&mut self) {
        self.control = Vec::new();
    }

    /// Sealed bytes for the socket.
    pub(super) fn outgoing(&mut self) -> &[u8] {
        self.seal_control();
        &self.outbox.buffer[self.outbox.start..self.outbox.end]
    }

    /// The socket took `n` bytes of [`outgoing`](Self::outgoing): lets that many bytes' worth of streams go on.
    pub(super) fn sent(&mut self, n: usize) {
        self.outbox.consume(n);
        let mut turns = match OUTBOX.saturating_sub(self.outbox.len()) / (RECORDS * FULL_RECORD) {
            // Nothing will come that could wake those who are left, so all have their turn.
            _ if self.outbox.len() == 0 => usize::MAX,
            turns => turns,
        };
        while turns > 0 && self.send_window > 0 {
            let Some(id) = self.waiting.pop_front() else { return };
            if let Some(writer) = self.streams.get_mut(&id).and_then(|entry| entry.writer.take()) {
                writer.wake();
                turns -= 1;
            }
        }
    }

    /// Appends close_notify: the last thing that this connection sends.
    pub(super) fn seal_close(&mut self) {
        self.seal_control();
        let space = self.outbox.space(tls::HEADER + 2 + tls::TRAILER);
        if let Ok(n) = self.tls.sealer.close(space) {
            self.outbox.end += n;
        }
    }

    // What goes out.

    fn seal_control(&mut self) {
        if self.tls.rekey_due(RECORDS as u64 + 1) {
            match self.tls.rekey(self.outbox.space(FULL_RECORD)) {
                Ok(n) => self.outbox.end += n,
                Err(error) => return self.finish(error.into()),
            }
        }
        if self.control.is_empty() {
            return;
        }
        let control = std::mem::take(&mut self.control);
        for content in control.chunks(tls::MAX_CONTENT) {
            let len = tls::HEADER + content.len() + tls::TRAILER;
            let record = &mut self.outbox.space(len)[..len];
            record[tls::HEADER..][..content.len()].copy_from_slice(content);
            match self.tls.sealer.seal(record) {
                Ok(()) => self.outbox.end += len,
                Err(error) => return self.finish(error.into()),
            }
        }
        self.control = control;
        self.control.clear();
        if self.control.capacity() > 4096 {
            self.control = Vec::new();
        }
    }

    fn put_reset(&mut self, id: u32, code: u32) {
        frame::put(&mut self.control, frame::RST_STREAM, 0, id, &code.to_be_bytes());
        self.wake_driver();
    }

    fn put_window(&mut self, id: u32, increment: u32) {
        frame::put(&mut self.control, frame::WINDOW_UPDATE, 0, id, &increment.to_be_bytes());
        self.wake_driver();
    }

    fn put_headers(&mut self, id: u32, end: bool, block: &[u8]) {
        frame::put_headers(&mut self.control, id, end, block, self.max_frame);
        self.wake_driver();
    }

    /// Reads up to `most` bytes by `read` into records of stream `id`, and seals them. `most` is what
    /// [`poll_ready`](Self::poll_ready) gave.
    pub(super) fn send(
        &mut self,
        id: u32,
        most: usize,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> Result<io::Result<usize>, StreamError> {
        // HEADERS of this stream may be among them, and must come first.
        self.seal_control();
        match self.streams.get(&id).map(|entry| &entry.write) {
            Some(Side::Open) => {}
            Some(Side::Cut(error)) => return Err(error.clone()),
            Some(Side::Ended) | None => return Err(StreamError::Lost("written after its end".into())),
        }
        let most = most.min(RECORDS * PAYLOAD);
        let records = most.div_ceil(PAYLOAD);
        let space = &mut self.outbox.space(records * FULL_RECORD)[..records * FULL_RECORD];
        let mut slices: [IoSliceMut<'_>; RECORDS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let mut left = most;
        for (slice, record) in slices.iter_mut().zip(space.chunks_mut(FULL_RECORD)) {
            let n = left.min(PAYLOAD);
            *slice = IoSliceMut::new(&mut record[LEAD..LEAD + n]);
            left -= n;
        }
        let n = match read(&mut slices[..records]) {
            Ok(n @ 1..) => n.min(most),
            nothing => {
                // An outbox that has stayed empty gives its buffer back.
                self.outbox.consume(0);
                return Ok(nothing);
            }
        };
        let (mut left, mut used) = (n, 0);
        for record in space.chunks_mut(FULL_RECORD) {
            let payload = left.min(PAYLOAD);
            if payload == 0 {
                break;
            }
            left -= payload;
            frame::put_header(&mut record[tls::HEADER..], payload, frame::DATA, 0, id);
            let len = LEAD + payload + tls::TRAILER;
            if let Err(error) = self.tls.sealer.seal(&mut record[..len]) {
                let end = End::from(error);
                let lost = StreamError::Lost(end.to_string().into());
                self.finish(end);
                return Err(lost);
            }
            used += len;
        }
        self.outbox.end += used;
        self.send_window -= n as i64;
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.send_window -= n as i64;
        }
        self.wake_driver();
        Ok(Ok(n))
    }

    pub(super) fn poll_ready(&mut self, id: u32, cx: &Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        let pending = self.outbox.len() + self.control.len();
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamError::Lost("stream forgotten".into())));
        };
        match &entry.write {
            Side::Open => {}
            Side::Cut(error) => return Poll::Ready(Err(error.clone())),
            Side::Ended => return Poll::Ready(Err(StreamError::Lost("written after its end".into()))),
        }
        let room = OUTBOX.saturating_sub(pending) / FULL_RECORD * PAYLOAD;
        let most = (room as i64).min(self.send_window).min(entry.send_window);
        if most > 0 {
            return Poll::Ready(Ok(want.min(most as usize)));
        }
        register(&mut entry.writer, cx);
        if entry.send_window > 0 && !self.waiting.contains(&id) {
            self.waiting.push_back(id);
        }
        Poll::Pending
    }

    pub(super) fn shutdown(&mut self, id: u32) -> Result<(), StreamError> {
        let Some(entry) = self.streams.get_mut(&id) else { return Ok(()) };
        match &entry.write {
            Side::Ended => Ok(()),
            Side::Cut(error) => Err(error.clone()),
            Side::Open => {
                entry.write = Side::Ended;
                frame::put(&mut self.control, frame::DATA, frame::END_STREAM, id, &[]);
                self.wake_driver();
                Ok(())
            }
        }
    }

    /// Cuts the stream off, unless both directions have ended.
    pub(super) fn reset(&mut self, id: u32, code: u32) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        if entry.open() {
            entry.cut(&StreamError::Reset(code));
            self.put_reset(id, code);
        }
    }

    pub(super) fn poll_read(&mut self, id: u32, cx: &Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamError::Lost("stream forgotten".into())));
        };
        let Some(bytes) = entry.pop() else {
            return match &entry.read {
                Side::Ended => Poll::Ready(Ok(None)),
                Side::Cut(error) => Poll::Ready(Err(error.clone())),
                Side::Open => {
                    register(&mut entry.reader, cx);
                    Poll::Pending
                }
            };
        };
        Poll::Ready(Ok(Some(bytes)))
    }

    /// The reader has passed on `n` bytes of what it was given: the peer gets window for as many. Not sooner, or a reader
    /// that cannot pass anything on would be sent more and more.
    pub(super) fn passed_on(&mut self, id: u32, n: usize) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.passed_on(n);
        if entry.read != Side::Open {
            return;
        }
        entry.unreleased += n as u32;
        if entry.unreleased >= entry.max_window / 2 {
            let mut increment = std::mem::take(&mut entry.unreleased);
            // The reader has caught up: a larger window might have kept it busy.
            let may_grow = entry.charge.as_ref().is_none_or(|charge| charge.may_grow());
            if std::mem::take(&mut entry.caught_up) && entry.max_window < MAX_STREAM_WINDOW && may_grow {
                increment += entry.max_window;
                entry.max_window *= 2;
            }
            entry.recv_window += i64::from(increment);
            self.put_window(id, increment);
        }
    }

    pub(super) fn poll_cut(&mut self, id: u32, cx: &Context<'_>, reading: bool) -> Poll<StreamError> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(StreamError::Lost("stream forgotten".into()));
        };
        match (&entry.read, &entry.write) {
            (Side::Cut(error), _) => Poll::Ready(error.clone()),
            (_, Side::Cut(error)) if !reading => Poll::Ready(error.clone()),
            _ => {
                register(&mut entry.watcher, cx);
                Poll::Pending
            }
        }
    }

    /// Whoever read has gone: the peer shall not go on sending.
    pub(super) fn drop_reader(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|entry| entry.read == Side::Open) {
            self.reset(id, code::CANCEL);
        }
        self.release(id);
    }

    /// Whoever wrote has gone: without END_STREAM, what was sent is not whole.
    pub(super) fn drop_writer(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|entry| entry.write == Side::Open) {
            self.reset(id, code::CANCEL);
        }
        self.release(id);
    }

    /// A handle has gone; the last one takes the stream along, and what is not finished is reset.
    pub(super) fn release(&mut self, id: u32) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.handles -= 1;
        if entry.handles == 0 {
            self.reset(id, code::CANCEL);
            self.streams.remove(&id);
            // The driver may wait for the last of them.
            self.wake_driver();
        }
    }

    /// From now on what is queued counts for somebody.
    pub(super) fn charge(&mut self, id: u32, charge: Arc<Charge>) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.charge = Some(charge);
        if entry.account() {
            self.reset(id, error::ENHANCE_YOUR_CALM);
        }
    }

    /// The request or answer has become a stream with two halves.
    pub(super) fn split(&mut self, id: u32) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.handles = 2;
        }
    }

    /// Opens a stream with these headers (client); `None` if the peer takes no new ones.
    pub(super) fn open(&mut self, block: &[u8]) -> Option<u32> {
        if self.closing() {
            return None;
        }
        let id = self.last_id;
        self.last_id += 2;
        self.streams.insert(id, Entry::new(self.first_send_window, 1));
        self.put_headers(id, false, block);
        Some(id)
    }

    /// The answer (client); or why there is none, and whether the peer did nothing with the request.
    pub(super) fn poll_answer(&mut self, id: u32, cx: &Context<'_>) -> Poll<Result<Head, (StreamError, bool)>> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err((StreamError::Lost("stream forgotten".into()), false)));
        };
        if let Some(head) = entry.answer.take() {
            return Poll::Ready(Ok(head));
        }
        match (&entry.read, &entry.write) {
            (Side::Cut(error), _) | (_, Side::Cut(error)) => Poll::Ready(Err((error.clone(), entry.not_processed))),
            _ => {
                register(&mut entry.reader, cx);
                Poll::Pending
            }
        }
    }

    /// Answers a request (server).
    pub(super) fn answer(&mut self, id: u32, block: &[u8], end: bool) -> Result<(), StreamError> {
        match self.streams.get_mut(&id).map(|entry| &mut entry.write) {
            Some(side @ Side::Open) => {
                if end {
                    *side = Side::Ended;
                }
            }
            Some(Side::Cut(error)) => return Err(error.clone()),
            Some(Side::Ended) | None => return Err(StreamError::Lost("answered twice".into())),
        }
        self.in_vain = 0;
        self.put_headers(id, end, block);
        if end {
            // The client need not send what nobody reads (RFC 9113 §8.1).
            self.reset(id, error::NO_ERROR);
        }
        Ok(())
    }

    // What comes in.

    fn plaintext(&mut self, mut bytes: Bytes) {
        if !self.preface.is_empty() {
            let n = self.preface.len().min(bytes.len());
            let (expected, rest) = self.preface.split_at(n);
            if bytes.split_to(n) != expected {
                return self.close(error::PROTOCOL_ERROR, End::Protocol("no HTTP/2 preface".into()));
            }
            self.preface = rest;
        }
        while self.end.is_none() {
            let said = match self.parser.next(&mut bytes) {
                Ok(None) => return,
                Ok(Some(event)) => self.event(event),
                Err(broken) => Err(broken),
            };
            if let Err(Broken(code, what)) = said {
                self.close(code, End::Protocol(format!("the peer sent {what}").into()));
            }
        }
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Data { stream, bytes, flow, end } => self.data(stream, bytes, flow, end),
            Event::Headers { stream, block, end } => self.headers(stream, &block, end),
            Event::Reset { stream, code } => {
                self.check_known(stream)?;
                if let Some(entry) = self.streams.get_mut(&stream) {
                    entry.not_processed = code == error::REFUSED_STREAM;
                    entry.cut(&StreamError::Reset(code));
                }
                // A request that nobody has taken needs no handler.
                if let Some(at) = self.arrivals.iter().position(|(id, _)| *id == stream) {
                    self.arrivals.remove(at);
                    self.streams.remove(&stream);
                    return self.in_vain();
                }
                Ok(())
            }
            Event::Settings(settings) => self.settings(&settings),
            Event::SettingsAck => Ok(()),
            Event::Ping(data) => {
                frame::put(&mut self.control, frame::PING, frame::ACK, 0, &data);
                Ok(())
            }
            Event::PingAck(data) => {
                if data == PING {
                    self.ping_sent = false;
                } else if data == LAST_PING && self.draining && !self.goaway {
                    // The second half of an orderly end: what the peer opened before it knew has arrived.
                    self.goaway = true;
                    let payload = [self.last_id.to_be_bytes(), error::NO_ERROR.to_be_bytes()].concat();
                    frame::put(&mut self.control, frame::GOAWAY, 0, 0, &payload);
                }
                self.wake_driver();
                Ok(())
            }
            Event::GoAway { last, code } => {
                self.goaway |= self.client;
                if code != error::NO_ERROR {
                    let why = format!("GOAWAY from the peer with code {code:#x}");
                    self.finish(if self.client { End::Protocol(why.into()) } else { End::Lost(why.into()) });
                } else if self.client {
                    for (_, entry) in self.streams.range_mut(last.saturating_add(1)..) {
                        entry.not_processed = true;
                        entry.cut(&StreamError::Lost("the peer is shutting down".into()));
                    }
                }
                self.wake_driver();
                Ok(())
            }
            Event::WindowUpdate { stream: 0, increment } => {
                if increment == 0 {
                    return Err(Broken(error::PROTOCOL_ERROR, "an empty WINDOW_UPDATE"));
                }
                self.send_window += i64::from(increment);
                if self.send_window > CONNECTION_WINDOW.into() {
                    return Err(Broken(error::FLOW_CONTROL_ERROR, "a window larger than 2^31-1"));
                }
                self.sent(0);
                Ok(())
            }
            Event::WindowUpdate { stream, increment } => {
                self.check_known(stream)?;
                let Some(entry) = self.streams.get_mut(&stream) else { return Ok(()) };
                entry.send_window += i64::from(increment);
                let wrong = match increment {
                    0 => error::PROTOCOL_ERROR,
                    _ if entry.send_window > CONNECTION_WINDOW.into() => error::FLOW_CONTROL_ERROR,
                    _ => {
                        if let Some(writer) = entry.writer.take() {
                            writer.wake();
                        }
                        return Ok(());
                    }
                };
                self.reset(stream, wrong);
                Ok(())
            }
        }
    }

    /// A stream that nobody has opened cannot be spoken about.
    fn check_known(&self, id: u32) -> Result<(), Broken> {
        let known = if self.client { id < self.last_id } else { id <= self.last_id };
        if known && id % 2 == 1 {
            Ok(())
        } else {
            Err(Broken(error::PROTOCOL_ERROR, "a frame on a stream never opened"))
        }
    }

    fn data(&mut self, id: u32, bytes: Bytes, flow: u32, end: bool) -> Result<(), Broken> {
        self.check_known(id)?;
        self.empty = if flow == 0 && !end { self.empty + 1 } else { 0 };
        if self.empty > MAX_EMPTY {
            return Err(Broken(error::ENHANCE_YOUR_CALM, "too many empty DATA frames"));
        }
        self.recv_window -= i64::from(flow);
        if self.recv_window < 0 {
            return Err(Broken(error::FLOW_CONTROL_ERROR, "more than the connection's window"));
        }
        if self.recv_window < CONNECTION_WINDOW_LOW {
            let increment = i64::from(CONNECTION_WINDOW) - self.recv_window;
            self.recv_window += increment;
            self.put_window(0, increment as u32);
        }
        // What we have reset may still be sent something.
        let Some(entry) = self.streams.get_mut(&id) else { return Ok(()) };
        match entry.read {
            Side::Open => {}
            Side::Cut(_) => return Ok(()),
            Side::Ended => {
                self.reset(id, error::STREAM_CLOSED);
                return Ok(());
            }
        }
        entry.recv_window -= i64::from(flow);
        if entry.recv_window < 0 || (self.client && !entry.answered) {
            let wrong = if entry.recv_window < 0 { error::FLOW_CONTROL_ERROR } else { error::PROTOCOL_ERROR };
            self.reset(id, wrong);
            return Ok(());
        }
        // Padding is read by nobody, so it is given back here.
        entry.unreleased += flow - bytes.len() as u32;
        if entry.push(bytes) {
            self.reset(id, error::ENHANCE_YOUR_CALM);
            return Ok(());
        }
        if end {
            entry.read = Side::Ended;
            if let Some(reader) = entry.reader.take() {
                reader.wake();
            }
        }
        Ok(())
    }

    fn headers(&mut self, id: u32, block: &[u8], end: bool) -> Result<(), Broken> {
        let most = if self.client { SERVER_HEADERS } else { CLIENT_HEADERS };
        let (fields, whole) = self
            .decoder
            .decode(block, most)
            .map_err(|_| Broken(error::COMPRESSION_ERROR, "a header block that cannot be decoded"))?;
        let mut head = parse_head(fields, self.client);
        if !whole {
            head.malformed = Some("more header bytes than SETTINGS_MAX_HEADER_LIST_SIZE");
        }
        if id.is_multiple_of(2) {
            return Err(Broken(error::PROTOCOL_ERROR, "HEADERS on a stream that a server would open"));
        }
        if self.client || id <= self.last_id {
            self.check_known(id)?;
            return self.answer_or_trailers(id, head, end);
        }
        self.last_id = id;
        if self.goaway {
            self.put_reset(id, error::REFUSED_STREAM);
            return Ok(());
        }
        let open = self.streams.values().filter(|entry| entry.open()).count();
        if open >= MAX_STREAMS || self.streams.len() >= MAX_KEPT {
            self.put_reset(id, error::REFUSED_STREAM);
            return self.in_vain();
        }
        let mut entry = Entry::new(self.first_send_window, 1);
        if end {
            entry.read = Side::Ended;
        }
        self.streams.insert(id, entry);
        self.arrivals.push_back((id, head));
        self.wake_driver();
        Ok(())
    }

    /// Counts a request that came to nothing.
    fn in_vain(&mut self) -> Result<(), Broken> {
        self.in_vain += 1;
        if self.in_vain > MAX_IN_VAIN {
            return Err(Broken(error::ENHANCE_YOUR_CALM, "request after request that came to nothing"));
        }
        Ok(())
    }

    fn answer_or_trailers(&mut self, id: u32, head: Head, end: bool) -> Result<(), Broken> {
        let Some(entry) = self.streams.get_mut(&id) else { return Ok(()) };
        if entry.read != Side::Open {
            return Ok(());
        }
        if self.client && !entry.answered {
            let broken = head.malformed.is_some() || head.status.is_none();
            if broken || (end && head.status.is_some_and(|s| s < 200)) {
                self.reset(id, error::PROTOCOL_ERROR);
                return Ok(());
            }
            // 1xx announces an answer and is none.
            if head.status.is_none_or(|status| status >= 200) {
                entry.answer = Some(head);
                entry.answered = true;
            }
        } else if !end {
            self.reset(id, error::PROTOCOL_ERROR);
            return Ok(());
        }
        if end {
            entry.read = Side::Ended;
        }
        if let Some(reader) = entry.reader.take() {
            reader.wake();
        }
        Ok(())
    }

    fn settings(&mut self, settings: &[(u16, u32)]) -> Result<(), Broken> {
        let mut max_streams = self.max_streams.unwrap_or(u32::MAX);
        for &(name, value) in settings {
            match name {
                frame::SETTING_ENABLE_PUSH if value > 1 || (self.client && value == 1) => {
                    return Err(Broken(error::PROTOCOL_ERROR, "a wrong SETTINGS_ENABLE_PUSH"));
                }
                frame::SETTING_MAX_CONCURRENT_STREAMS => max_streams = value,
                frame::SETTING_INITIAL_WINDOW_SIZE => {
                    if value > CONNECTION_WINDOW {
                        return Err(Broken(error::FLOW_CONTROL_ERROR, "a wrong SETTINGS_INITIAL_WINDOW_SIZE"));
                    }
                    let change = i64::from(value) - self.first_send_window;
                    self.first_send_window = value.into();
                    for entry in self.streams.values_mut() {
                        entry.send_window += change;
                        if entry.send_window > CONNECTION_WINDOW.into() {
                            return Err(Broken(error::FLOW_CONTROL_ERROR, "a window larger than 2^31-1"));
                        }
                        if let Some(writer) = entry.writer.take() {
                            writer.wake();
                        }
                    }
                }
                frame::SETTING_MAX_FRAME_SIZE => {
                    if !(16_384..=16_777_215).contains(&value) {
                        return Err(Broken(error::PROTOCOL_ERROR, "a wrong SETTINGS_MAX_FRAME_SIZE"));
                    }
                    // DATA never needs more than the smallest maximum, HEADERS hardly ever.
                    self.max_frame = tls::MAX_CONTENT;
                }
                _ => {}
            }
        }
        self.max_streams = Some(max_streams);
        frame::put(&mut self.control, frame::SETTINGS, frame::ACK, 0, &[]);
        self.wake_driver();
        Ok(())
    }

    // What a client uses.

    /// Streams that the peer takes; `None` until it has said so.
    pub(super) fn max_streams(&self) -> Option<u32> {
        self.max_streams
    }

    /// Whether the peer takes no new streams.
    pub(super) fn closing(&self) -> bool {
        self.goaway || self.end.is_some() || self.last_id > 0x3fff_ffff
    }
}

impl From<TlsError> for End {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Tls(why) => Self::Tls(why),
            TlsError::Io(error) => Self::Lost(error.to_string().into()),
        }
    }
}
