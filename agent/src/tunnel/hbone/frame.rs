//! HTTP/2 frames (RFC 9113 §4, §6): written into a buffer, and read from pieces cut anywhere.

use bytes::{Buf as _, Bytes};

/// Bytes before the payload of a frame.
pub(super) const HEADER: usize = 9;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

pub(super) const ACK: u8 = 1;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY_FIELDS: u8 = 0x20;

pub(super) const SETTING_ENABLE_PUSH: u16 = 2;
pub(super) const SETTING_MAX_CONCURRENT_STREAMS: u16 = 3;
pub(super) const SETTING_INITIAL_WINDOW_SIZE: u16 = 4;
pub(super) const SETTING_MAX_FRAME_SIZE: u16 = 5;
pub(super) const SETTING_MAX_HEADER_LIST_SIZE: u16 = 6;

/// Largest frame that we accept, in bytes (§14.3). DATA is passed on as it comes, so that nothing waits for its end.
pub(super) const MAX_FRAME: u32 = 1 << 20;
/// Largest SETTINGS or GOAWAY that we keep, in bytes; a peer with more to say is attacking.
const MAX_CONTROL: usize = 16 << 10;
/// CONTINUATION frames in one header block: 64 KiB of headers need four of the smallest maximum.
const MAX_CONTINUATIONS: u32 = 64;

/// Codes of RST_STREAM and GOAWAY that we send ourselves (RFC 9113 §7).
pub(super) mod error {
    pub(in super::super) const NO_ERROR: u32 = 0;
    pub(in super::super) const PROTOCOL_ERROR: u32 = 1;
    pub(in super::super) const FLOW_CONTROL_ERROR: u32 = 3;
    pub(in super::super) const STREAM_CLOSED: u32 = 5;
    pub(in super::super) const FRAME_SIZE_ERROR: u32 = 6;
    pub(in super::super) const REFUSED_STREAM: u32 = 7;
    pub(in super::super) const COMPRESSION_ERROR: u32 = 9;
    pub(in super::super) const ENHANCE_YOUR_CALM: u32 = 11;
}

/// The peer broke the protocol: the code of our GOAWAY, and what it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) u32, pub(super) &'static str);

/// Something that the peer said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A piece of DATA. `flow` counts against windows: the piece and what padding came with it.
    Data {
        stream: u32,
        bytes: Bytes,
        flow: u32,
        end: bool,
    },
    /// A whole header block.
    Headers {
        stream: u32,
        block: Vec<u8>,
        end: bool,
    },
    Reset {
        stream: u32,
        code: u32,
    },
    Settings(Vec<(u16, u32)>),
    SettingsAck,
    Ping([u8; 8]),
    PingAck([u8; 8]),
    GoAway {
        last: u32,
        code: u32,
    },
    WindowUpdate {
        stream: u32,
        increment: u32,
    },
}

/// Writes a frame header.
pub(super) fn put_header(out: &mut [u8], len: usize, kind: u8, flags: u8, stream: u32) {
    out[..3].copy_from_slice(&(len as u32).to_be_bytes()[1..]);
    out[3] = kind;
    out[4] = flags;
    out[5..9].copy_from_slice(&stream.to_be_bytes());
}

/// Appends a frame.
pub(super) fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let mut header = [0; HEADER];
    put_header(&mut header, payload.len(), kind, flags, stream);
    out.extend_from_slice(&header);
    out.extend_from_slice(payload);
}

/// Appends a header block, in as many frames as it needs (RFC 9113 §4.3).
pub(super) fn put_headers(out: &mut Vec<u8>, stream: u32, end: bool, block: &[u8], max_frame: usize) {
    let mut kind = HEADERS;
    let mut flags = if end { END_STREAM } else { 0 };
    let mut rest = block;
    loop {
        let (piece, tail) = rest.split_at(rest.len().min(max_frame));
        rest = tail;
        if rest.is_empty() {
            put(out, kind, flags | END_HEADERS, stream, piece);
            return;
        }
        put(out, kind, flags, stream, piece);
        (kind, flags) = (CONTINUATION, 0);
    }
}

/// Reads frames from a stream of bytes that is cut anywhere.
pub(super) struct Parser {
    state: State,
    header: [u8; HEADER],
    have: usize,
    /// The header block that CONTINUATION goes on with: stream, END_STREAM, bytes so far, frames so far.
    block: Option<(u32, bool, Vec<u8>, u32)>,
    /// Most bytes of a header block as it comes over the wire.
    max_block: usize,
}

enum State {
    Header,
    /// Bytes of the payload and of padding still to come; `pad_len` still to be read.
    Data {
        stream: u32,
        left: usize,
        padding: usize,
        pad_len: bool,
        flow: u32,
        end: bool,
    },
    Collect {
        kind: u8,
        flags: u8,
        stream: u32,
        left: usize,
        payload: Vec<u8>,
    },
    Skip {
        left: usize,
    },
}

impl Parser {
    pub(super) fn new(max_block: usize) -> Self {
        Self { state: State::Header, header: [0; HEADER], have: 0, block: None, max_block }
    }

    /// The next thing said in `input`; `None` when it is used up.
    pub(super) fn next(&mut self, input: &mut Bytes) -> Result<Option<Event>, Broken> {
        loop {
            match &mut self.state {
                State::Header => {
                    let n = (HEADER - self.have).min(input.len());
                    input.split_to(n).copy_to_slice(&mut self.header[self.have..self.have + n]);
                    self.have += n;
                    if self.have < HEADER {
                        return Ok(None);
                    }
                    self.have = 0;
                    self.state = self.start()?;
                }
                State::Skip { left } => {
                    let n = (*left).min(input.len());
                    input.advance(n);
                    *left -= n;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Header;
                }
                State::Data { stream, left, padding, pad_len, flow, end } => {
                    if *pad_len {
                        if input.is_empty() {
                            return Ok(None);
                        }
                        let pad = input.get_u8() as usize;
                        if pad > *left - 1 {
                            return Err(Broken(error::PROTOCOL_ERROR, "padding longer than its frame"));
                        }
                        *left -= 1 + pad;
                        *flow += 1 + pad as u32;
                        (*padding, *pad_len) = (pad, false);
                    }
                    let n = (*left).min(input.len());
                    if n == 0 && *left > 0 {
                        return Ok(None);
                    }
                    *left -= n;
                    let done = *left == 0;
                    let event = Event::Data {
                        stream: *stream,
                        bytes: input.split_to(n),
                        flow: std::mem::take(flow) + n as u32,
                        end: *end && done,
                    };
                    if done {
                        self.state = State::Skip { left: *padding };
                    }
                    return Ok(Some(event));
                }
                State::Collect { kind, flags, stream, left, payload } => {
                    let n = (*left).min(input.len());
                    payload.extend_from_slice(&input.split_to(n));
                    *left -= n;
                    if *left > 0 {
                        return Ok(None);
                    }
                    let (kind, flags, stream, payload) = (*kind, *flags, *stream, std::mem::take(payload));
                    self.state = State::Header;
                    if let Some(event) = self.finish(kind, flags, stream, payload)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }

    fn start(&self) -> Result<State, Broken> {
        let [a, b, c, kind, flags, id @ ..] = self.header;
        let left = u32::from_be_bytes([0, a, b, c]) as usize;
        let stream = u32::from_be_bytes(id) & 0x7fff_ffff;
        if left > MAX_FRAME as usize {
            return Err(Broken(error::FRAME_SIZE_ERROR, "a frame larger than SETTINGS_MAX_FRAME_SIZE"));
        }
        if let Some((of, ..)) = &self.block
            && (kind != CONTINUATION || stream != *of)
        {
            return Err(Broken(error::PROTOCOL_ERROR, "a header block interrupted by another frame"));
        }
        let (on_stream, sizes) = match kind {
            DATA => (Some(true), 0..=left),
            HEADERS => (Some(true), 0..=self.max_block + 256),
            PRIORITY => (Some(true), 5..=5),
            RST_STREAM => (Some(true), 4..=4),
            SETTINGS => (Some(false), 0..=MAX_CONTROL),
            PUSH_PROMISE => return Err(Broken(error::PROTOCOL_ERROR, "PUSH_PROMISE, although push is off")),
            PING => (Some(false), 8..=8),
            GOAWAY => (Some(false), 8..=MAX_CONTROL),
            WINDOW_UPDATE => (None, 4..=4),
            CONTINUATION if self.block.is_none() => {
                return Err(Broken(error::PROTOCOL_ERROR, "CONTINUATION without HEADERS"));
            }
            CONTINUATION => (Some(true), 0..=self.max_block),
            // RFC 9113 §4.1: what we do not know is not for us.
            _ => return Ok(State::Skip { left }),
        };
        if on_stream.is_some_and(|expected| expected != (stream != 0)) {
            return Err(Broken(error::PROTOCOL_ERROR, "a frame on a stream it must not be on"));
        }
        if !sizes.contains(&left) {
            let calm = matches!(kind, HEADERS | CONTINUATION | SETTINGS | GOAWAY) && left >= *sizes.start();
            let code = if calm { error::ENHANCE_YOUR_CALM } else { error::FRAME_SIZE_ERROR };
            return Err(Broken(code, "a frame of impossible size"));
        }
        Ok(match kind {
            DATA => {
                let pad_len = flags & PADDED != 0;
                if pad_len && left == 0 {
                    return Err(Broken(error::FRAME_SIZE_ERROR, "padding without its length"));
                }
                State::Data { stream, left, padding: 0, pad_len, flow: 0, end: flags & END_STREAM != 0 }
            }
            PRIORITY => State::Skip { left },
            _ => State::Collect { kind, flags, stream, left, payload: Vec::new() },
        })
    }

    fn finish(&mut self, kind: u8, flags: u8, stream: u32, payload: Vec<u8>) -> Result<Option<Event>, Broken> {
        let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("four bytes"));
        Ok(Some(match kind {
            HEADERS => {
                let mut fragment = &payload[..];
                if flags & PADDED != 0 {
                    let (pad, rest) =
                        fragment.split_first().ok_or(Broken(error::FRAME_SIZE_ERROR, "padding without its length"))?;
                    let len = rest.len().checked_sub(*pad as usize);
                    fragment = &rest[..len.ok_or(Broken(error::PROTOCOL_ERROR, "padding longer than its frame"))?];
                }
                if flags & PRIORITY_FIELDS != 0 {
                    fragment = fragment.get(5..).ok_or(Broken(error::FRAME_SIZE_ERROR, "HEADERS without priority"))?;
                }
                self.block = Some((stream, flags & END_STREAM != 0, fragment.to_vec(), 0));
                return self.end_block(flags);
            }
            CONTINUATION => {
                if let Some((_, _, block, frames)) = &mut self.block {
                    block.extend_from_slice(&payload);
                    *frames += 1;
                    if *frames > MAX_CONTINUATIONS {
                        return Err(Broken(error::ENHANCE_YOUR_CALM, "a header block in too many pieces"));
                    }
                }
                return self.end_block(flags);
            }
            RST_STREAM => Event::Reset { stream, code: word(0) },
            SETTINGS if flags & ACK != 0 => {
                if !payload.is_empty() {
                    return Err(Broken(error::FRAME_SIZE_ERROR, "an acknowledgement of SETTINGS with content"));
                }
                Event::SettingsAck
            }
            SETTINGS => {
                if !payload.len().is_multiple_of(6) {
                    return Err(Broken(error::FRAME_SIZE_ERROR, "SETTINGS that end in the middle"));
                }
                let setting =
                    |s: &[u8]| (u16::from_be_bytes([s[0], s[1]]), u32::from_be_bytes([s[2], s[3], s[4], s[5]]));
                Event::Settings(payload.chunks(6).map(setting).collect())
            }
            PING => {
                let data = payload.try_into().expect("checked to be eight bytes");
                if flags & ACK != 0 { Event::PingAck(data) } else { Event::Ping(data) }
            }
            GOAWAY => Event::GoAway { last: word(0) & 0x7fff_ffff, code: word(4) },
            _ => Event::WindowUpdate { stream, increment: word(0) & 0x7fff_ffff },
        }))
    }

    fn end_block(&mut self, flags: u8) -> Result<Option<Event>, Broken> {
        let too_long = self.block.as_ref().is_some_and(|(_, _, block, _)| block.len() > self.max_block);
        if too_long {
            return Err(Broken(error::ENHANCE_YOUR_CALM, "a header block too long"));
        }
        if flags & END_HEADERS == 0 {
            return Ok(None);
        }
        Ok(self.block.take().map(|(stream, end, block, _)| Event::Headers { stream, block, end }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(parser: &mut Parser, bytes: &[u8]) -> Result<Vec<Event>, Broken> {
        let mut input = Bytes::copy_from_slice(bytes);
        let mut out = Vec::new();
        while let Some(event) = parser.next(&mut input)? {
            out.push(event);
        }
        assert!(input.is_empty());
        Ok(out)
    }

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, kind, flags, stream, payload);
        out
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let big = [0; 20_000];
        for (bytes, code) in [
            (frame(DATA, 0, 0, b"x"), error::PROTOCOL_ERROR),
            (frame(DATA, PADDED, 1, &[]), error::FRAME_SIZE_ERROR),
            (frame(DATA, PADDED, 1, &[1]), error::PROTOCOL_ERROR),
            (frame(HEADERS, 0, 0, &[]), error::PROTOCOL_ERROR),
            (frame(HEADERS, PADDED | END_HEADERS, 1, &[2, 0]), error::PROTOCOL_ERROR),
            (frame(HEADERS, PRIORITY_FIELDS | END_HEADERS, 1, &[0; 4]), error::FRAME_SIZE_ERROR),
            (frame(HEADERS, END_HEADERS, 1, &big), error::ENHANCE_YOUR_CALM),
            (frame(PRIORITY, 0, 1, &[0; 4]), error::FRAME_SIZE_ERROR),
            (frame(RST_STREAM, 0, 1, &[0; 3]), error::FRAME_SIZE_ERROR),
            (frame(RST_STREAM, 0, 0, &[0; 4]), error::PROTOCOL_ERROR),
            (frame(SETTINGS, 0, 1, &[]), error::PROTOCOL_ERROR),
            (frame(SETTINGS, 0, 0, &[0; 5]), error::FRAME_SIZE_ERROR),
            (frame(SETTINGS, ACK, 0, &[0; 6]), error::FRAME_SIZE_ERROR),
            (frame(SETTINGS, 0, 0, &big), error::ENHANCE_YOUR_CALM),
            (frame(PUSH_PROMISE, 0, 1, &[0; 4]), error::PROTOCOL_ERROR),
            (frame(PING, 0, 0, &[0; 7]), error::FRAME_SIZE_ERROR),
            (frame(PING, 0, 1, &[0; 8]), error::PROTOCOL_ERROR),
            (frame(GOAWAY, 0, 0, &[0; 7]), error::FRAME_SIZE_ERROR),
            (frame(WINDOW_UPDATE, 0, 1, &[0; 5]), error::FRAME_SIZE_ERROR),
            (frame(CONTINUATION, END_HEADERS, 1, &[]), error::PROTOCOL_ERROR),
            ([frame(HEADERS, 0, 1, &[]), frame(DATA, 0, 1, &[])].concat(), error::PROTOCOL_ERROR),
            ([frame(HEADERS, 0, 1, &[]), frame(CONTINUATION, 0, 3, &[])].concat(), error::PROTOCOL_ERROR),
            ([frame(HEADERS, 0, 1, &[]), frame(CONTINUATION, 0, 1, &[]).repeat(65)].concat(), error::ENHANCE_YOUR_CALM),
            (vec![0x10, 0, 1, DATA, 0, 0, 0, 0, 1], error::FRAME_SIZE_ERROR),
        ] {
            let result = events(&mut Parser::new(16_384), &bytes);
            assert_eq!(result.map_err(|b| b.0), Err(code), "{:?}", &bytes[..bytes.len().min(20)]);
        }
    }

    #[test]
    fn padding_counts_for_flow_control_and_is_not_data() {
        let bytes = [frame(DATA, PADDED | END_STREAM, 1, b"\x03abc\0\0\0"), frame(0xee, 0xff, 7, b"unknown")].concat();
        let data = Event::Data { stream: 1, bytes: Bytes::from_static(b"abc"), flow: 7, end: true };
        assert_eq!(events(&mut Parser::new(100), &bytes), Ok(vec![data]));
    }

    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
        prop_oneof![
            (bytes(600), any::<bool>(), 1u32..9).prop_map(|(b, end, s)| frame(DATA, u8::from(end), s, &b)),
            (bytes(600), 1u32..9, any::<bool>(), 1usize..300).prop_map(|(b, s, end, max)| {
                let mut out = Vec::new();
                put_headers(&mut out, s, end, &b, max.max(b.len() / 30));
                out
            }),
            any::<u32>().prop_map(|c| frame(RST_STREAM, 0, 5, &c.to_be_bytes())),
            any::<[u8; 8]>().prop_map(|p| frame(PING, 0, 0, &p)),
            any::<[u8; 18]>().prop_map(|p| frame(SETTINGS, 0, 0, &p)),
            (1u32..0x7fff_ffff).prop_map(|n| frame(WINDOW_UPDATE, 0, 0, &n.to_be_bytes())),
        ]
    }

    /// Pieces of DATA joined again, so that only what was said counts and not how it was cut.
    fn joined(events: Vec<Event>) -> Vec<Event> {
        let mut out: Vec<Event> = Vec::new();
        for event in events {
            if let (
                Some(Event::Data { stream: a, bytes, flow, end }),
                Event::Data { stream: b, bytes: more, flow: f, end: e },
            ) = (out.last_mut(), &event)
                && a == b
                && !*end
            {
                *bytes = [&bytes[..], more].concat().into();
                *flow += f;
                *end = *e;
                continue;
            }
            out.push(event);
        }
        out
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_does_not_matter(frames in prop::collection::vec(any_frame(), 1..12),
                                                 cuts in prop::collection::vec(1usize..200, 1..20)) {
            let bytes = frames.concat();
            let whole = events(&mut Parser::new(16_384), &bytes).expect("valid");
            let mut parser = Parser::new(16_384);
            let mut cut = Vec::new();
            let mut rest = &bytes[..];
            for n in cuts.iter().cycle() {
                let (piece, tail) = rest.split_at((*n).min(rest.len()));
                cut.extend(events(&mut parser, piece).expect("valid"));
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(joined(cut), joined(whole));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut input = Bytes::from(bytes);
            let mut parser = Parser::new(1000);
            while let Ok(Some(_)) = parser.next(&mut input) {}
        }
    }
}
