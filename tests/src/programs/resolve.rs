//! One question to a name server, over UDP: the addresses of a name (RFC 1035), as a pod's resolver asks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Failure;

/// Number of the question; one socket asks one.
const ID: u16 = 0x4355;
/// Type A and class IN.
const A_IN: [u8; 4] = [0, 1, 0, 1];

/// What the name server said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolveResult {
    /// The name's IPv4 addresses.
    pub addresses: Vec<IpAddr>,
    /// The server's code: 0 for an answer, 3 for a name that does not exist.
    pub code: Option<u8>,
    /// How it failed, if it did.
    pub failure: Option<Failure>,
    /// The error's own text.
    pub error: Option<String>,
}

/// `name` is whole: no list of domains to search is tried.
pub(super) fn ask(server: SocketAddr, name: &str, limit: Duration) -> ResolveResult {
    let mut result = ResolveResult { addresses: Vec::new(), code: None, failure: None, error: None };
    match exchange(server, name, limit) {
        Ok((code, addresses)) => (result.code, result.addresses) = (Some(code), addresses),
        Err(error) => (result.failure, result.error) = (Some(Failure::of(&error)), Some(error.to_string())),
    }
    result
}

fn exchange(server: SocketAddr, name: &str, limit: Duration) -> io::Result<(u8, Vec<IpAddr>)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(limit))?;
    socket.connect(server)?;
    socket.send(&question(name)?)?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    answer(&buffer[..length]).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an answer to the question"))
}

fn question(name: &str) -> io::Result<Vec<u8>> {
    let mut bytes = ID.to_be_bytes().to_vec();
    // Recursion desired; one question.
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..64).contains(length));
        bytes.push(length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a name"))?);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(A_IN);
    Ok(bytes)
}

/// The code and the addresses of an answer; `None` if it is none to our question.
fn answer(bytes: &[u8]) -> Option<(u8, Vec<IpAddr>)> {
    let number = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let is_answer = bytes.get(2)? & 0x80 != 0;
    if number(0)? != ID || !is_answer {
        return None;
    }
    let mut at = 12;
    for _ in 0..number(4)? {
        at = after_name(bytes, at)? + 4;
    }
    let mut addresses = Vec::new();
    for _ in 0..number(6)? {
        at = after_name(bytes, at)?;
        // Type, class, lifetime, length; then the value.
        let length = usize::from(number(at + 8)?);
        let value = bytes.get(at + 10..at + 10 + length)?;
        if bytes.get(at..at + 4)? == A_IN {
            addresses.push(IpAddr::from(<[u8; 4]>::try_from(value).ok()?));
        }
        at += 10 + length;
    }
    Some((bytes.get(3)? & 0xf, addresses))
}

/// Where a name ends: at its empty label, or at a reference to another place.
fn after_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            reference if reference & 0xc0 != 0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn addresses_of_an_answer_are_told_and_what_is_none_is_not() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let to = server.local_addr().expect("its address");
        let run = thread::spawn(move || {
            let mut buffer = [0; 1500];
            let (length, from) = server.recv_from(&mut buffer).expect("a question");
            let mut said = buffer[..length].to_vec();
            (said[2], said[7]) = (0x81, 2);
            // An alias first, as CNAME is; then an address, of a name that was said before.
            said.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 5, 0, 2, 0xc0, 12]);
            said.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 7]);
            server.send_to(&said, from).expect("the client is there");
        });
        let got = ask(to, "web.test.svc.cluster.local", Duration::from_secs(2));
        run.join().expect("the server ran");
        assert_eq!((got.code, got.addresses), (Some(0), vec![IpAddr::from([10, 96, 0, 7])]));
        assert_eq!(answer(&question("a.b").expect("a name")), None, "a question is no answer");
        assert_eq!(answer(&[0x43, 0x55, 0x80]), None, "cut off");
        assert_eq!(ask(to, "a..b", Duration::from_secs(2)).failure, Some(Failure::Other));
    }
}
