//! From a name to addresses; hickory stays behind this door.
//!
//! The C library's resolver is not used: it blocks, and in a static binary it needs NSS modules that are not there.

use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use hickory_resolver::TokioResolver;

/// Splits `HOST:PORT`; an IPv6 address stands in brackets.
///
/// # Errors
/// One line that says what is expected.
pub fn host_port(text: &str) -> Result<(String, u16), String> {
    let expected = || format!("{text:?} must be HOST:PORT, as in istiod.istio-system.svc:15012 or [fd00::1]:15012");
    let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(expected)?;
    let bare = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(inner) => {
            inner.filter(|inner| inner.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6())).ok_or_else(expected)?
        }
        None if host.is_empty() || host.contains(':') => return Err(expected()),
        None => host,
    };
    Ok((bare.to_owned(), port))
}

/// Looks a host up as the system is configured (`/etc/hosts`, `/etc/resolv.conf`, read for each look-up since both may
/// change while the agent runs); an address is its own answer.
///
/// # Errors
/// The configuration cannot be read, nobody answered, or the name has no address.
pub async fn addresses(host: &str, port: u16) -> anyhow::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let resolver = TokioResolver::builder_tokio()
        .and_then(hickory_resolver::ResolverBuilder::build)
        .context("read the system's resolver configuration")?;
    let answer = resolver.lookup_ip(host).await.with_context(|| format!("look up {host}"))?;
    let addresses: Vec<_> = answer.iter().map(|ip| SocketAddr::new(ip, port)).collect();
    anyhow::ensure!(!addresses.is_empty(), "{host} has no address");
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_are_told_apart() {
        for (text, host, port) in [
            ("istiod.istio-system.svc:15012", "istiod.istio-system.svc", 15012),
            ("10.0.0.1:15012", "10.0.0.1", 15012),
            ("[fd00::1]:15012", "fd00::1", 15012),
        ] {
            assert_eq!(host_port(text), Ok((host.to_owned(), port)));
        }
        for wrong in
            ["istiod", "istiod:", ":15012", "istiod:0", "istiod:65536", "fd00::1:15012", "[fd00::1]", "[x]:1", ""]
        {
            assert!(host_port(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn addresses_and_hosts_of_the_system_need_no_server() {
        let ip = addresses("192.0.2.7", 1).await.expect("an address is its own answer");
        assert_eq!(ip, ["192.0.2.7:1".parse().expect("a literal")]);
        let local = addresses("localhost", 2).await.expect("in /etc/hosts");
        assert!(!local.is_empty() && local.iter().all(|addr| addr.ip().is_loopback()), "{local:?}");
    }
}
