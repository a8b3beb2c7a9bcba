//! The messages by which agents report what they have in force, `culvert.control.v1.Reports`.
//!
//! Both ends have them from here, written by hand as those of the certificate API are. What is in force is one text, a line
//! for each object, so that reading it takes no more memory than it has bytes, and its digest is that of the text.

use std::{collections::HashMap, fmt::Write as _};

use anyhow::{Context, ensure};
use aws_lc_rs::digest;

use crate::model::ObjectRef;

/// Path of the one method of the service.
pub(crate) const REPORT: &str = "/culvert.control.v1.Reports/Report";

/// gRPC metadata key by which a replica that does not lead says which one does, as `host:port`.
pub(crate) const LEADER: &str = "leader";

/// Largest message that either side accepts, in bytes. An object has about 60.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Most objects that a report may name.
pub(crate) const MAX_OBJECTS: usize = 20_000;

/// Longest kind and namespace (a DNS label, RFC 1123), and longest name (a DNS subdomain), in bytes.
const MAX_LABEL: usize = 63;
const MAX_NAME: usize = 253;

/// SHA-256 of [`ReportRequest::objects`].
pub(crate) type Digest = [u8; digest::SHA256_OUTPUT_LEN];

/// The generations in force, by [`key`].
pub(crate) type Generations = HashMap<Box<str>, i64>;

/// What an agent has in force.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ReportRequest {
    /// [`Digest`] of all objects, whether they are there or not.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) digest: Vec<u8>,
    /// See [`line`]; empty unless the server has asked for it, or nothing is in force.
    #[prost(string, tag = "2")]
    pub(crate) objects: String,
}

/// What the agent is to do next.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ReportResponse {
    /// The server does not know what the digest stands for: report at once again, with the objects.
    #[prost(bool, tag = "1")]
    pub(crate) wanted: bool,
    /// After how many seconds to report again if nothing changes.
    #[prost(uint32, tag = "2")]
    pub(crate) interval_seconds: u32,
}

/// What an object goes by.
pub(crate) fn key(kind: &str, object: &ObjectRef) -> String {
    format!("{kind}/{}/{}", object.namespace, object.name)
}

/// Adds an object to the text of a report.
pub(crate) fn line(text: &mut String, kind: &str, object: &ObjectRef, generation: i64) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{kind}/{}/{} {generation}", object.namespace, object.name);
}

/// The digest of a report's text.
pub(crate) fn digest(text: &str) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
    digest
}

/// Reads the text of a report.
///
/// # Errors
/// One line: it has too many objects, one of them twice, or names that Kubernetes would not take.
pub(crate) fn parse(text: &str) -> anyhow::Result<Generations> {
    let objects = text.lines().take(MAX_OBJECTS + 1).count();
    ensure!(objects <= MAX_OBJECTS, "more than {MAX_OBJECTS} objects");
    let mut generations = Generations::with_capacity(objects);
    for (index, line) in text.lines().enumerate() {
        let (key, generation) = object(line).with_context(|| format!("object {}", index + 1))?;
        ensure!(generations.insert(key.into(), generation).is_none(), "object {}: is there twice", index + 1);
    }
    Ok(generations)
}

fn object(line: &str) -> anyhow::Result<(&str, i64)> {
    let (key, generation) = line.split_once(' ').context("has no generation")?;
    let mut parts = key.split('/');
    for (what, longest) in [("kind", MAX_LABEL), ("namespace", MAX_LABEL), ("name", MAX_NAME)] {
        let part = parts.next().with_context(|| format!("has no {what}"))?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        ensure!((1..=longest).contains(&part.len()), "the length of its {what} is not 1 to {longest}");
        ensure!(part.bytes().all(allowed), "its {what} has other characters than letters, digits, - and .");
    }
    ensure!(parts.next().is_none(), "is more than kind/namespace/name");
    let generation = generation.parse::<i64>().ok().filter(|generation| *generation >= 0);
    Ok((key, generation.context("its generation is not a number from 0")?))
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn what_is_written_is_what_is_read() {
        let mut text = String::new();
        let (a, b) = (ObjectRef::new("default", "strict"), ObjectRef::new("istio-system", "a.b-c"));
        line(&mut text, "PeerAuthentication", &a, 7);
        line(&mut text, "AuthorizationPolicy", &b, i64::MAX);
        let generations = parse(&text).expect("our own");
        assert_eq!(generations.len(), 2);
        assert_eq!(generations.get(&*key("PeerAuthentication", &a)), Some(&7));
        assert_eq!(generations.get(&*key("AuthorizationPolicy", &b)), Some(&i64::MAX));
        assert_eq!(parse("").expect("nothing is in force").len(), 0);
    }

    /// What the other side of another version must agree with, byte by byte.
    #[test]
    fn the_messages_are_these_bytes() {
        let mut objects = String::new();
        line(&mut objects, "PeerAuthentication", &ObjectRef::new("a", "b"), 3);
        assert_eq!(objects, "PeerAuthentication/a/b 3\n");
        let request = ReportRequest { digest: vec![1, 2], objects };
        assert_eq!(request.encode_to_vec(), b"\x0a\x02\x01\x02\x12\x19PeerAuthentication/a/b 3\n");
        let response = ReportResponse { wanted: true, interval_seconds: 10 };
        assert_eq!(response.encode_to_vec(), b"\x08\x01\x10\x0a");
        // FIPS 180-4, of the empty message.
        assert_eq!(digest("")[..4], [0xe3, 0xb0, 0xc4, 0x42]);
    }

    #[test]
    fn what_kubernetes_would_not_take_is_refused() {
        let name = "n".repeat(MAX_NAME);
        let label = "k".repeat(MAX_LABEL);
        assert!(parse(&format!("{label}/{label}/{name} 1\n")).is_ok());
        for (text, said) in [
            (format!("K/a/{name}n 1"), "name"),
            (format!("K/a{label}/b 1"), "namespace"),
            (format!("K{label}/a/b 1"), "kind"),
            ("K/a/b".to_owned(), "no generation"),
            ("K/a 1".to_owned(), "no name"),
            ("K//b 1".to_owned(), "namespace"),
            ("K/a/b/c 1".to_owned(), "more than"),
            ("K/a/ä 1".to_owned(), "characters"),
            ("K/a/b -1".to_owned(), "generation"),
            ("K/a/b 9223372036854775808".to_owned(), "generation"),
            ("K/a/b 1\nK/a/b 2\n".to_owned(), "object 2: is there twice"),
            ("\n".to_owned(), "no generation"),
        ] {
            let error = format!("{:#}", parse(&text).expect_err(&text));
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_report_has_its_most_objects() {
        let mut text = String::new();
        for number in 0..MAX_OBJECTS {
            line(&mut text, "K", &ObjectRef::new("a", &format!("p{number}")), 1);
        }
        assert_eq!(parse(&text).expect("as many as may be").len(), MAX_OBJECTS);
        line(&mut text, "K", &ObjectRef::new("a", "one-more"), 1);
        assert_eq!(parse(&text).expect_err("one too many").to_string(), "more than 20000 objects");
    }

    /// Whatever an agent sends is refused with a line, or is a list of objects that means the same when it is written again.
    #[test]
    fn fuzzed_reports_are_refused_or_understood() {
        let taken = std::cell::Cell::new(0);
        crate::fuzz::run("report", |bytes| {
            let Ok(request) = ReportRequest::decode(bytes) else { return };
            assert_eq!(ReportRequest::decode(&*request.encode_to_vec()).expect("what we write ourselves"), request);
            let generations = match parse(&request.objects) {
                Ok(generations) => generations,
                Err(error) => return assert!(!format!("{error:#}").contains('\n')),
            };
            assert!(generations.len() <= MAX_OBJECTS);
            let mut again = String::new();
            for (key, generation) in &generations {
                let parts: Vec<&str> = key.split('/').collect();
                let [kind, namespace, name] = parts[..] else { panic!("{key:?} has three parts") };
                line(&mut again, kind, &ObjectRef::new(namespace, name), *generation);
            }
            assert_eq!(parse(&again).expect("what we write ourselves"), generations);
            taken.set(taken.get() + generations.len());
        });
        assert!(taken.get() > 0, "a seed is right");
    }
}
