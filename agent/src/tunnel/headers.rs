//! The three telemetry headers of a CONNECT (semantics §14.2), written and read; never an input of policy ([H.2]).

use std::{fmt::Write as _, net::SocketAddr};

/// `forwarded`: `for="<client ip:port>"` and, if a service was addressed, `;host=<hostname>`.
pub fn forwarded(client: SocketAddr, service: Option<&str>) -> String {
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    match service {
        None => format!("for=\"{client}\""),
        Some(host) => format!("for=\"{client}\";host={host}"),
    }
}

/// The client that a `forwarded` header names, or `None` if it names none with address and port.
///
/// The port may be used only if the address equals the TCP source of the tunnel ([H.5]).
pub fn forwarded_client(header: &str) -> Option<SocketAddr> {
    let (name, value) = header.split(';').find_map(|pair| pair.trim().split_once('='))?;
    if !name.eq_ignore_ascii_case("for") {
        return None;
    }
    let addr: SocketAddr = value.trim_matches('"').parse().ok()?;
    Some(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
}

/// The service hostname that a `forwarded` header names, if it names one.
pub fn forwarded_host(header: &str) -> Option<&str> {
    let mut pairs = header.split(';').filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| name.eq_ignore_ascii_case("host")).map(|(_, host)| host.trim_matches('"'))
}

/// `baggage`: a comma list of `key=value`; pairs whose value is empty (unknown) are left out.
///
/// Bytes that W3C Baggage does not allow in a value are percent-encoded.
pub fn baggage<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut out = String::new();
    for (key, value) in pairs.into_iter().filter(|(_, value)| !value.is_empty()) {
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(key);
        out.push('=');
        for byte in value.bytes() {
            match byte {
                // baggage-octet, without the `%` that starts an escape.
                0x21 | 0x23..=0x24 | 0x26..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e => out.push(byte as char),
                other => {
                    // Writing to a string does not fail.
                    let _ = write!(out, "%{other:02X}");
                }
            }
        }
    }
    out
}

/// The value of `key` in a `baggage` header, percent-decoded; `None` if absent or not UTF-8.
pub fn baggage_value(header: &str, key: &str) -> Option<String> {
    let (_, value) = header
        .split(',')
        .filter_map(|member| member.split(';').next()?.split_once('='))
        .find(|(name, _)| name.trim() == key)?;
    let mut bytes = Vec::new();
    let mut rest = value.trim().as_bytes();
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                let digit = |b: &u8| (*b as char).to_digit(16);
                bytes.push((digit(high)? * 16 + digit(low)?) as u8);
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// `traceparent`: `00-<32 hex>-<16 hex>-00`; both ids are new per connection, and zero is not an id (W3C).
pub fn traceparent(trace: u128, span: u64) -> String {
    format!("00-{:032x}-{:016x}-00", trace.max(1), span.max(1))
}

/// The trace and the span that a `traceparent` names, or `None` if it is not one (W3C Trace Context §3.2).
pub fn trace_and_span(header: &str) -> Option<(u128, u64)> {
    let mut parts = header.trim().split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    // A later version may have more parts; the first one has not.
    let form = hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    if !form || !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
        return None;
    }
    let (trace, span) = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(span, 16).ok()?);
    (trace != 0 && span != 0).then_some((trace, span))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// §14.2, the exact texts.
    #[test]
    fn headers_are_written_as_the_table_says() {
        let v4: SocketAddr = "10.0.1.7:40312".parse().expect("address");
        let v6: SocketAddr = "[fd00::7]:40312".parse().expect("address");
        assert_eq!(forwarded(v4, None), r#"for="10.0.1.7:40312""#);
        assert_eq!(forwarded(v6, Some("a.b.svc")), r#"for="[fd00::7]:40312";host=a.b.svc"#);
        assert_eq!(traceparent(0xab, 0xcd), "00-000000000000000000000000000000ab-00000000000000cd-00");
        let pairs = [("k8s.cluster.name", "c"), ("cloud.region", ""), ("service.name", "a,b\"ü%")];
        assert_eq!(baggage(pairs), "k8s.cluster.name=c,service.name=a%2Cb%22%C3%BC%25");
    }

    /// §14.2; W3C Trace Context §3.2.
    #[test]
    fn a_trace_is_read_back_and_nothing_else_is_taken_for_one() {
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        assert_eq!(trace_and_span(&traceparent(0xab, 0xcd)), Some((0xab, 0xcd)));
        let right = |text: String| assert!(trace_and_span(&text).is_some(), "{text}");
        right(format!("00-{trace}-{span}-01"));
        right(format!("cc-{trace}-{span}-01-later"));
        for wrong in [
            String::new(),
            format!("00-{trace}-{span}"),
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{trace}+-{span}-01"),
            format!("00-+{}-{span}-01", &trace[1..]),
        ] {
            assert_eq!(trace_and_span(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn headers_are_read_back() {
        let v4: SocketAddr = "10.0.1.7:40312".parse().expect("address");
        let v6: SocketAddr = "[fd00::7]:40312".parse().expect("address");
        assert_eq!(forwarded_client(&forwarded(v4, Some("x"))), Some(v4));
        assert_eq!(forwarded_client(&forwarded(v6, None)), Some(v6));
        assert_eq!(forwarded_host(&forwarded(v4, Some("x.y.svc"))), Some("x.y.svc"));
        assert_eq!(forwarded_host("For=\"10.0.0.1:1\"; Host=\"x\""), Some("x"));
        assert_eq!(forwarded_host(&forwarded(v6, None)), None);
        for none in ["", "for=unknown", "host=x", "for=\"10.0.0.1\"", "by=\"10.0.0.1:2\""] {
            assert_eq!(forwarded_client(none), None, "{none}");
        }
        let text = baggage([("a", "1"), ("service.name", "a,b\"ü%")]);
        assert_eq!(baggage_value(&text, "service.name").as_deref(), Some("a,b\"ü%"));
        assert_eq!(baggage_value(&text, "b"), None);
        assert_eq!(baggage_value("a=%zz", "a"), None);
    }

    #[test]
    fn fuzzed_headers_are_read_or_left_alone() {
        crate::fuzz::run("headers", |bytes| {
            let text = String::from_utf8_lossy(bytes);
            if let Some(client) = forwarded_client(&text) {
                let host = forwarded_host(&text).filter(|host| !host.contains([';', '"', '=']) && host.trim() == *host);
                let again = forwarded(client, host);
                assert_eq!((forwarded_client(&again), forwarded_host(&again)), (Some(client), host), "{again}");
            }
            for key in ["k8s.cluster.name", "service.name", "a"] {
                if let Some(value) = baggage_value(&text, key).filter(|value| !value.is_empty()) {
                    assert_eq!(baggage_value(&baggage([(key, &*value)]), key), Some(value));
                }
            }
            if let Some((trace, span)) = trace_and_span(&text) {
                assert_eq!(trace_and_span(&traceparent(trace, span)), Some((trace, span)));
            }
        });
    }
}
