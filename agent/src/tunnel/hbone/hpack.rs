//! Header compression (RFC 7541): a decoder with a bounded dynamic table, and an encoder that keeps no state.

use std::collections::VecDeque;

use bytes::Bytes;

/// Largest dynamic table of our decoder, in bytes: the default of RFC 9113 §6.5.2, which we do not change.
const TABLE_SIZE: usize = 4096;
/// What an entry counts beside its text (RFC 7541 §4.1).
const ENTRY_OVERHEAD: usize = 32;

/// One header field. Names and values are bytes from outside.
pub(super) type Field = (Bytes, Bytes);

/// The header block breaks RFC 7541: a connection error, because the tables of both sides no longer agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The peer's compression state.
#[derive(Default)]
pub(super) struct Decoder {
    /// Newest first.
    entries: VecDeque<Field>,
    size: usize,
    limit: Option<usize>,
}

impl Decoder {
    /// Decodes a whole header block. Fields beyond `most` bytes (counted as RFC 9113 §6.5.2 does) are decoded, to keep
    /// the table right, and dropped; the answer then says so with `false`.
    pub(super) fn decode(&mut self, mut block: &[u8], most: usize) -> Result<(Vec<Field>, bool), Malformed> {
        let mut fields = Vec::new();
        let mut total = 0usize;
        let mut may_resize = true;
        while let Some(&first) = block.first() {
            if first & 0xe0 == 0x20 {
                let limit = integer(&mut block, 5)?;
                if !may_resize || limit > TABLE_SIZE {
                    return Err(Malformed);
                }
                self.limit = Some(limit);
                self.evict(limit);
                continue;
            }
            may_resize = false;
            let (field, insert) = if first & 0x80 != 0 {
                let index = integer(&mut block, 7)?;
                (self.get(index)?, false)
            } else {
                let insert = first & 0x40 != 0;
                let index = integer(&mut block, if insert { 6 } else { 4 })?;
                let name = if index == 0 { string(&mut block)? } else { self.get(index)?.0 };
                ((name, string(&mut block)?), insert)
            };
            total = total.saturating_add(field.0.len() + field.1.len() + ENTRY_OVERHEAD);
            if insert {
                self.insert(field.clone());
            }
            if total <= most {
                fields.push(field);
            }
        }
        Ok((fields, total <= most))
    }

    fn get(&self, index: usize) -> Result<Field, Malformed> {
        let index = index.checked_sub(1).ok_or(Malformed)?;
        if let Some((name, value)) = STATIC.get(index) {
            return Ok((Bytes::from_static(name.as_bytes()), Bytes::from_static(value.as_bytes())));
        }
        self.entries.get(index - STATIC.len()).cloned().ok_or(Malformed)
    }

    fn insert(&mut self, field: Field) {
        let size = field.0.len() + field.1.len() + ENTRY_OVERHEAD;
        let limit = self.limit.unwrap_or(TABLE_SIZE);
        // An entry larger than the table empties it and is not kept (RFC 7541 §4.4).
        self.evict(limit.saturating_sub(size));
        if size <= limit {
            self.size += size;
            self.entries.push_front(field);
        }
    }

    fn evict(&mut self, limit: usize) {
        while self.size > limit {
            let Some((name, value)) = self.entries.pop_back() else { return };
            self.size -= name.len() + value.len() + ENTRY_OVERHEAD;
        }
    }
}

/// An integer with a prefix of `bits` (RFC 7541 §5.1); larger than 2^28 is malformed here.
fn integer(block: &mut &[u8], bits: u32) -> Result<usize, Malformed> {
    let (&first, mut rest) = block.split_first().ok_or(Malformed)?;
    let mask = (1usize << bits) - 1;
    let mut value = first as usize & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (&byte, tail) = rest.split_first().ok_or(Malformed)?;
            rest = tail;
            if shift > 21 {
                return Err(Malformed);
            }
            value += (byte as usize & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *block = rest;
    Ok(value)
}

fn string(block: &mut &[u8]) -> Result<Bytes, Malformed> {
    let huffman = block.first().ok_or(Malformed)? & 0x80 != 0;
    let len = integer(block, 7)?;
    let (text, rest) = block.split_at_checked(len).ok_or(Malformed)?;
    *block = rest;
    if huffman { huffman_decode(text) } else { Ok(Bytes::copy_from_slice(text)) }
}

/// RFC 7541 §5.2: padding is the start of EOS, shorter than a byte; EOS itself must not occur.
fn huffman_decode(text: &[u8]) -> Result<Bytes, Malformed> {
    // The shortest code has 5 bits.
    let mut out = Vec::with_capacity(text.len() * 8 / 5);
    let (mut code, mut len) = (0u32, 0usize);
    for byte in text {
        for bit in (0..8).rev() {
            code = code << 1 | u32::from(byte >> bit & 1);
            len += 1;
            let row = &HUFFMAN.rows[len];
            let offset = code.wrapping_sub(row.first_code);
            if offset < row.count {
                let symbol = HUFFMAN.symbols[(row.first_symbol + offset) as usize];
                out.push(u8::try_from(symbol).map_err(|_| Malformed)?);
                (code, len) = (0, 0);
            } else if len == 30 {
                return Err(Malformed);
            }
        }
    }
    if len > 7 || code != (1 << len) - 1 {
        return Err(Malformed);
    }
    Ok(out.into())
}

/// Appends a field as a literal that no table keeps (RFC 7541 §6.2.2), its name by static index if there is one.
pub(super) fn encode(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    match STATIC.iter().position(|(n, _)| n.as_bytes() == name) {
        Some(index) => put_integer(out, 0, 4, index + 1),
        None => {
            out.push(0);
            put_integer(out, 0, 7, name.len());
            out.extend_from_slice(name);
        }
    }
    put_integer(out, 0, 7, value.len());
    out.extend_from_slice(value);
}

/// Appends `:status: 200`, which the static table has.
pub(super) fn encode_ok(out: &mut Vec<u8>) {
    put_integer(out, 0x80, 7, 8);
}

fn put_integer(out: &mut Vec<u8>, first: u8, bits: u32, value: usize) {
    let mask = (1usize << bits) - 1;
    if value < mask {
        out.push(first | value as u8);
        return;
    }
    out.push(first | mask as u8);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// The codes of one length. They are consecutive, in the order of their symbols (the code is canonical).
#[derive(Clone, Copy)]
struct Row {
    first_code: u32,
    first_symbol: u32,
    count: u32,
}

struct Huffman {
    rows: [Row; 31],
    symbols: [u16; 257],
}

static HUFFMAN: Huffman = {
    let mut rows = [Row { first_code: 0, first_symbol: 0, count: 0 }; 31];
    let mut symbols = [0u16; 257];
    let (mut code, mut used, mut len) = (0u32, 0usize, 1usize);
    while len <= 30 {
        rows[len].first_code = code;
        rows[len].first_symbol = used as u32;
        let mut symbol = 0;
        while symbol < 257 {
            if CODE_BITS[symbol] as usize == len {
                symbols[used] = symbol as u16;
                used += 1;
                rows[len].count += 1;
            }
            symbol += 1;
        }
        code = (code + rows[len].count) << 1;
        len += 1;
    }
    Huffman { rows, symbols }
};

/// Bits of the code of each symbol; the last is EOS (RFC 7541 appendix B).
#[rustfmt::skip]
const CODE_BITS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// RFC 7541 appendix A; index 1 comes first.
#[rustfmt::skip]
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        let value = |b: u8| (b as char).to_digit(16).expect("hex") as u8;
        digits.chunks(2).map(|pair| value(pair[0]) << 4 | value(pair[1])).collect()
    }

    fn text(fields: &[Field]) -> Vec<String> {
        let text = |b: &Bytes| String::from_utf8(b.to_vec()).expect("text");
        fields.iter().map(|(name, value)| format!("{}: {}", text(name), text(value))).collect()
    }

    /// RFC 7541 appendix C.4: three requests with Huffman coding on one connection.
    #[test]
    fn the_examples_of_the_rfc_are_decoded() {
        let mut decoder = Decoder::default();
        for (block, last) in [
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", ":authority: www.example.com"),
            ("8286 84be 5886 a8eb 1064 9cbf", "cache-control: no-cache"),
            ("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", "custom-key: custom-value"),
        ] {
            let (fields, whole) = decoder.decode(&hex(block), 16384).expect("valid");
            assert!(whole);
            assert_eq!(text(&fields).last().map(String::as_str), Some(last));
            assert_eq!(text(&fields)[0], ":method: GET");
        }
        assert_eq!(decoder.size, 164);
    }

    /// RFC 7541 appendix C.6.1: a response, with a table of 256 bytes that evicts.
    #[test]
    fn a_small_table_evicts() {
        let mut decoder = Decoder::default();
        decoder.decode(&hex("3fe101"), 16384).expect("a table of 256 bytes");
        let first =
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad
                     1718 63c7 8f0b 97c8 e9ae 82ae 43d3";
        let (fields, _) = decoder.decode(&hex(first), 16384).expect("valid");
        assert_eq!(text(&fields)[3], "location: https://www.example.com");
        assert_eq!(decoder.size, 222);
        decoder.decode(&hex("4883 640e ffc1 c0bf"), 16384).expect("valid");
        assert_eq!(decoder.size, 222);
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        for block in [
            "80",                  // index 0
            "be",                  // an entry that is not there
            "ff ffff ffff 7f",     // an integer without end
            "3fe2 1f",             // a table of 4097 bytes
            "8220",                // a new table size in the middle
            "0085 6162",           // a text that ends early
            "00",                  // no name
            "0001 6181 ff",        // padding of a whole byte
            "0001 6181 00",        // padding that is not of EOS
            "0001 6184 3fff ffff", // EOS
        ] {
            assert_eq!(Decoder::default().decode(&hex(block), 16384).map(drop), Err(Malformed), "{block}");
        }
    }

    /// 16 bytes on the wire that stand for 64 KiB must not be stored.
    #[test]
    fn fields_beyond_the_limit_are_not_kept() {
        let mut decoder = Decoder::default();
        let mut block = vec![0x40, 1, b'a'];
        put_integer(&mut block, 0, 7, 4000);
        block.extend([b'x'; 4000]);
        block.extend([0xbe; 100]);
        let (fields, whole) = decoder.decode(&block, 16384).expect("valid");
        assert!(!whole);
        assert_eq!(fields.len(), 4);
        assert!(decoder.size <= TABLE_SIZE);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(fields in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40),
                                                                       prop::collection::vec(any::<u8>(), 0..300)), 0..20)) {
            let mut block = Vec::new();
            for (name, value) in &fields {
                encode(&mut block, name, value);
            }
            let (decoded, whole) = Decoder::default().decode(&block, usize::MAX).expect("valid");
            prop_assert!(whole);
            let expected: Vec<Field> = fields.into_iter().map(|(n, v)| (n.into(), v.into())).collect();
            prop_assert_eq!(decoded, expected);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_grow(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..10)) {
            let mut decoder = Decoder::default();
            for block in blocks {
                let _ = decoder.decode(&block, 4096);
                prop_assert!(decoder.size <= TABLE_SIZE);
                prop_assert!(decoder.entries.len() <= TABLE_SIZE / ENTRY_OVERHEAD);
            }
        }
    }
}
