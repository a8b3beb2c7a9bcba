//! `host:port` as a CONNECT carries it (semantics §14.2).

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// The host half of an [`Authority`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address; IPv4 mapped into IPv6 has become IPv4, so that it compares with socket addresses.
    Ip(IpAddr),
    /// A DNS name in lower case, at most 253 bytes.
    Name(String),
}

/// Where a CONNECT asks to go: only a hint for the port, or for the service of a waypoint ([H.1]).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    /// Address or name.
    pub host: Host,
    /// 1 to 65535, host byte order.
    pub port: u16,
}

/// Why a text is not an authority; the answer to the peer is 400 (§14.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthorityError {
    /// The request has no `:authority`.
    Missing,
    /// Nothing stands behind the last colon, or there is none.
    NoPort,
    /// The port is not a decimal number from 1 to 65535.
    BadPort,
    /// The host is neither an address nor a DNS name.
    BadHost,
}

impl fmt::Display for AuthorityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "the request has no :authority; it must be <ip or name>:<port>",
            Self::NoPort => "the :authority has no port; it must be <ip or name>:<port>",
            Self::BadPort => "the port of the :authority is not a number from 1 to 65535",
            Self::BadHost => "the host of the :authority is neither an address nor a DNS name ([v6]:port)",
        })
    }
}

impl std::error::Error for AuthorityError {}

impl Authority {
    /// The address, if the host is one.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port)),
            Host::Name(_) => None,
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(addr: SocketAddr) -> Self {
        Self { host: Host::Ip(addr.ip().to_canonical()), port: addr.port() }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V4(ip)) => write!(f, "{ip}:{}", self.port),
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        if text.is_empty() {
            return Err(AuthorityError::Missing);
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (ip, rest) = rest.split_once(']').ok_or(AuthorityError::BadHost)?;
                // A zone (`%eth0`) means something on one machine only; the parser refuses it.
                let ip: Ipv6Addr = ip.parse().map_err(|_| AuthorityError::BadHost)?;
                if rest.is_empty() {
                    return Err(AuthorityError::NoPort);
                }
                let port = rest.strip_prefix(':').ok_or(AuthorityError::BadHost)?;
                (Host::Ip(IpAddr::V6(ip).to_canonical()), port)
            }
            None => {
                let (host, port) = text.rsplit_once(':').ok_or(AuthorityError::NoPort)?;
                (parse_host(host)?, port)
            }
        };
        if port.is_empty() {
            return Err(AuthorityError::NoPort);
        }
        if port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(AuthorityError::BadPort);
        }
        match port.parse() {
            Ok(0) | Err(_) => Err(AuthorityError::BadPort),
            Ok(port) => Ok(Self { host, port }),
        }
    }
}

fn parse_host(host: &str) -> Result<Host, AuthorityError> {
    if let Ok(ip) = host.parse::<std::net::Ipv4Addr>() {
        return Ok(Host::Ip(ip.into()));
    }
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A last label of digits only is a mistyped address such as 10.0.0.256, never a name.
    let last_is_number = host.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
    if host.len() > 253 || last_is_number || !host.split('.').all(label_ok) {
        return Err(AuthorityError::BadHost);
    }
    Ok(Host::Name(host.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// §14.2: `<pod IP>:<target port>`, `[v6]:port`, `<service hostname>:<service port>`; anything else is 400.
    #[test]
    fn authorities_are_parsed_strictly() {
        for (text, canonical) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[fd00::1]:65535", "[fd00::1]:65535"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("Productpage.Default.svc.cluster.local:9080", "productpage.default.svc.cluster.local:9080"),
            ("a:1", "a:1"),
            ("1.a:00080", "1.a:80"),
        ] {
            assert_eq!(text.parse::<Authority>().expect(text).to_string(), canonical);
        }
        use AuthorityError::{BadHost, BadPort, Missing, NoPort};
        let long_label = format!("{}:80", "a".repeat(64));
        let long_name = format!("{}:80", ["a"; 130].join("."));
        for (text, error) in [
            ("", Missing),
            ("10.0.0.1", NoPort),
            ("name", NoPort),
            ("name:", NoPort),
            ("[fd00::1]", NoPort),
            ("[fd00::1]:", NoPort),
            ("name:0", BadPort),
            ("name:65536", BadPort),
            ("name:999999", BadPort),
            ("name:+80", BadPort),
            ("name: 80", BadPort),
            ("name:http", BadPort),
            (":80", BadHost),
            ("fd00::1:80", BadHost),
            ("[10.0.0.1]:80", BadHost),
            ("[fd00::1%eth0]:80", BadHost),
            ("[fd00::1:80", BadHost),
            ("[fd00::1]80", BadHost),
            ("10.0.0.256:80", BadHost),
            ("10.1:80", BadHost),
            ("user@name:80", BadHost),
            ("na me:80", BadHost),
            ("na/me:80", BadHost),
            ("http://name:80", BadHost),
            ("name.:80", BadHost),
            ("-a:80", BadHost),
            ("a-:80", BadHost),
            ("näme:80", BadHost),
            (&long_label, BadHost),
            (&long_name, BadHost),
        ] {
            assert_eq!(text.parse::<Authority>(), Err(error), "{text}");
        }
    }

    #[test]
    fn a_socket_address_becomes_an_authority_and_back() {
        for (addr, text) in [("10.0.0.1:80", "10.0.0.1:80"), ("[fd00::1]:80", "[fd00::1]:80")] {
            let addr: SocketAddr = addr.parse().expect("address");
            assert_eq!(Authority::from(addr).to_string(), text);
            assert_eq!(Authority::from(addr).socket_addr(), Some(addr));
        }
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().expect("address");
        assert_eq!(Authority::from(mapped).to_string(), "10.0.0.1:80");
    }

    /// What is accepted is written again as it was meant.
    #[test]
    fn fuzzed_authorities_are_refused_or_mean_one_thing() {
        crate::fuzz::run("authority", |bytes| {
            let Ok(text) = str::from_utf8(bytes) else { return };
            let Ok(authority) = text.parse::<Authority>() else { return };
            assert_ne!(authority.port, 0);
            assert_eq!(authority.to_string().parse(), Ok(authority), "{text}");
        });
    }
}
