//! The head of a request or an answer: header fields by their meaning, and what is wrong with them.

use bytes::Bytes;

use super::hpack;

/// The head of a request or an answer.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub(super) method: Option<Bytes>,
    pub(super) authority: Option<Bytes>,
    pub(super) status: Option<u16>,
    pub(super) fields: Vec<hpack::Field>,
    /// What is wrong with it, if anything is (RFC 9113 §8.1.1).
    pub(super) malformed: Option<&'static str>,
}

impl Head {
    /// The first value of a field, if it is text.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        let (_, value) = self.fields.iter().find(|(n, _)| n == name.as_bytes())?;
        std::str::from_utf8(value).ok()
    }
}

/// RFC 9113 §8.2, §8.3: names in lower case, pseudo fields first, each at most once.
pub(super) fn parse_head(fields: Vec<hpack::Field>, answer: bool) -> Head {
    let mut head = Head::default();
    let mut wrong = None;
    for (name, value) in fields {
        let valid_value = !value.iter().any(|b| matches!(b, 0 | b'\r' | b'\n'));
        let repeated = match &name[..] {
            _ if !valid_value => {
                wrong = Some("a header value with a line end");
                continue;
            }
            [b':', ..] if !head.fields.is_empty() => {
                wrong = Some("a pseudo header after the others");
                continue;
            }
            b":status" if answer => {
                let status = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
                wrong = wrong.or_else(|| status.is_none().then_some("a :status that is not a number"));
                std::mem::replace(&mut head.status, status).is_some()
            }
            b":method" if !answer => head.method.replace(value).is_some(),
            b":authority" if !answer => head.authority.replace(value).is_some(),
            // Only a CONNECT is answered with more than 400, and it has none of these (RFC 9113 §8.5).
            b":scheme" | b":path" | b":protocol" if !answer => {
                wrong = wrong.or(Some("only CONNECT to host:port is served here"));
                false
            }
            [] | [b':', ..] => {
                wrong = Some("an unknown pseudo header");
                false
            }
            name_bytes => {
                let token =
                    |b: &u8| b.is_ascii_graphic() && !b.is_ascii_uppercase() && !b"\"(),/:;<=>?@[\\]{}".contains(b);
                if !name_bytes.iter().all(token) {
                    wrong = Some("a header name that is not one");
                }
                head.fields.push((name, value));
                false
            }
        };
        if repeated {
            wrong = Some("a pseudo header twice");
        }
    }
    head.malformed = wrong;
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(pairs: &[(&str, &str)]) -> Vec<hpack::Field> {
        let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        pairs.iter().map(|(name, value)| (bytes(name), bytes(value))).collect()
    }

    const METHOD: (&str, &str) = (":method", "CONNECT");
    const AUTHORITY: (&str, &str) = (":authority", "a:1");

    #[test]
    fn a_whole_request_and_answer_are_well_formed() {
        let head = parse_head(fields(&[METHOD, AUTHORITY, ("baggage", "k=v"), ("x", "")]), false);
        assert_eq!(head.malformed, None);
        assert_eq!((head.method.as_deref(), head.authority.as_deref()), (Some(&b"CONNECT"[..]), Some(&b"a:1"[..])));
        assert_eq!((head.field("baggage"), head.field("x"), head.field("y")), (Some("k=v"), Some(""), None));
        let head = parse_head(fields(&[(":status", "401"), ("x-culvert-reason", "r")]), true);
        assert_eq!((head.malformed, head.status, head.field("x-culvert-reason")), (None, Some(401), Some("r")));
    }

    /// RFC 9113 §8.2, §8.3, §8.5
    #[test]
    fn what_is_malformed_is_called_so() {
        for (answer, pairs) in [
            (false, &[METHOD, AUTHORITY, METHOD][..]),
            (false, &[METHOD, AUTHORITY, AUTHORITY]),
            (false, &[METHOD, ("x", "1"), AUTHORITY]),
            (false, &[METHOD, AUTHORITY, (":scheme", "https")]),
            (false, &[METHOD, AUTHORITY, (":path", "/")]),
            (false, &[METHOD, AUTHORITY, (":protocol", "websocket")]),
            (false, &[METHOD, AUTHORITY, (":status", "200")]),
            (false, &[METHOD, AUTHORITY, (":other", "1")]),
            (false, &[METHOD, AUTHORITY, ("", "1")]),
            (false, &[METHOD, AUTHORITY, ("Upper", "1")]),
            (false, &[METHOD, AUTHORITY, ("sp ace", "1")]),
            (false, &[METHOD, AUTHORITY, ("x", "a\r\nb: c")]),
            (false, &[METHOD, AUTHORITY, ("x", "\0")]),
            (true, &[(":status", "two")]),
            (true, &[(":status", "200"), (":status", "200")]),
            (true, &[(":status", "200"), METHOD]),
        ] {
            assert!(parse_head(fields(pairs), answer).malformed.is_some(), "{pairs:?}");
        }
    }

    /// Frames, the header blocks in them, and the authority of each request, as a server reads them.
    #[test]
    fn fuzzed_requests_are_refused_or_understood() {
        use super::super::frame::{Event, Parser};

        const MOST: usize = 64 << 10;
        crate::fuzz::run("connect", |bytes| {
            let (mut parser, mut decoder) = (Parser::new(MOST), hpack::Decoder::default());
            let mut input = Bytes::copy_from_slice(bytes);
            let mut before = input.len();
            while let Ok(Some(event)) = parser.next(&mut input) {
                assert!(input.len() < before || input.is_empty(), "every event takes bytes");
                before = input.len();
                let Event::Headers { block, .. } = event else { continue };
                assert!(block.len() <= MOST, "a header block is bounded");
                let Ok((fields, _)) = decoder.decode(&block, MOST) else { return };
                assert!(fields.iter().map(|(name, value)| name.len() + value.len() + 32).sum::<usize>() <= MOST);
                for answer in [false, true] {
                    let head = parse_head(fields.clone(), answer);
                    let authority = head.authority.as_deref().and_then(|bytes| str::from_utf8(bytes).ok());
                    let _ = authority.map(str::parse::<crate::tunnel::Authority>);
                    let _ = head.field("forwarded").map(crate::tunnel::headers::forwarded_client);
                }
            }
        });
    }
}
