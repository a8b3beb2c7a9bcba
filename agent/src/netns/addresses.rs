//! The addresses of a network namespace, and word of it when one comes or goes (rtnetlink(7)).

use std::{
    collections::BTreeSet,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recv, socket,
    },
};

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR`, linux/rtnetlink.h.
const GROUPS: u32 = 0x10 | 0x100;

/// All addresses of the devices of the namespace that the calling thread is in.
///
/// # Errors
/// The kernel did not list them.
pub fn here() -> nix::Result<BTreeSet<IpAddr>> {
    Ok(nix::ifaddrs::getifaddrs()?.filter_map(|interface| ip(&interface.address?)).collect())
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

/// Hears of changes in one namespace; works from every thread.
#[derive(Debug)]
pub struct Changes {
    socket: OwnedFd,
}

impl Changes {
    /// In the namespace that the calling thread is in, from now on.
    ///
    /// # Errors
    /// No netlink socket could be had.
    pub fn here() -> anyhow::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)
            .context("open a netlink socket")?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS)).context("ask netlink for changes of addresses")?;
        Ok(Self { socket })
    }

    /// Whether an address may have come or gone since this was asked before; never waits.
    pub fn any(&mut self) -> bool {
        let (mut any, mut message) = (false, [0; 16]);
        loop {
            match recv(self.socket.as_raw_fd(), &mut message, MsgFlags::empty()) {
                // More than the socket holds is a change too.
                Ok(_) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EINTR) => {}
                Err(_) => return any,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::testing::new_netns;

    #[test]
    fn an_address_that_comes_or_goes_is_heard_of() {
        let netns = new_netns();
        netns
            .run(|| {
                let mut changes = Changes::here().expect("a netlink socket");
                let ip = |words: &str| {
                    let status = std::process::Command::new("ip").args(words.split(' ')).status().expect("ip runs");
                    assert!(status.success(), "{words}");
                };
                assert!(!changes.any());
                for (words, there) in [("addr add 192.0.2.7/32 dev lo", true), ("addr del 192.0.2.7/32 dev lo", false)]
                {
                    ip(words);
                    assert!(changes.any(), "{words}");
                    assert!(!changes.any(), "{words}: once");
                    let all = here().expect("listed");
                    assert_eq!(all.contains(&"192.0.2.7".parse().expect("a literal")), there, "{words}: {all:?}");
                }
            })
            .expect("enter");
    }
}
