//! Binds inside a pod, and the node's own ports in a way that one agent can take over from another.
//!
//! What becomes of an accepted connection is `proxy`'s business.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use anyhow::Context as _;
use culvert_common::ListenerKind;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::netns::NetnsHandle;

/// Connections that may wait to be accepted: bursts of thousands; the pod's `net.core.somaxconn` bounds it further.
const BACKLOG: i32 = 16384;

/// The first port that is tried for a listener: above Linux's ephemeral ports, where applications rarely listen.
/// Connections reach a listener by `sk_lookup` and not by its port.
const FIRST_PORT: u16 = 65000;

/// One worker's listening sockets in one pod.
#[derive(Debug)]
pub struct Listeners {
    /// For redirected connections of the pod.
    pub outbound: std::net::TcpListener,
    /// For tunnels to the pod.
    pub tunnel: std::net::TcpListener,
    /// For plaintext to the pod whose verdict needs the agent.
    pub plaintext: std::net::TcpListener,
}

impl Listeners {
    /// The socket for a slot of the kernel's map.
    pub fn of(&self, kind: ListenerKind) -> BorrowedFd<'_> {
        match kind {
            ListenerKind::Outbound => self.outbound.as_fd(),
            ListenerKind::Tunnel => self.tunnel.as_fd(),
            ListenerKind::Plaintext => self.plaintext.as_fd(),
        }
    }
}

/// Opens one set of listeners in a pod's network namespace for each of `workers`.
///
/// Linux hands options of a listener down to the sockets that it accepts: all of them have `TCP_NODELAY` and
/// `SO_REUSEADDR`, and those of applications reset when they are closed.
///
/// # Errors
/// No descriptor or no port was left; nothing stays open.
pub fn open(netns: &NetnsHandle, workers: u32) -> anyhow::Result<Vec<Listeners>> {
    netns
        .run(|| {
            let mut next = FIRST_PORT;
            (0..workers)
                .map(|_| {
                    let (outbound, plaintext) = (listener(&mut next)?, listener(&mut next)?);
                    // What is accepted from these is reset unless it ended in order; see `proxy::copy`.
                    for listener in [&outbound, &plaintext] {
                        SockRef::from(listener).set_linger(Some(Duration::ZERO))?;
                    }
                    Ok(Listeners { outbound, tunnel: listener(&mut next)?, plaintext })
                })
                .collect::<io::Result<Vec<_>>>()
        })
        .context("enter the pod's network namespace")?
        .context("listen in the pod's network namespace")
}

/// Listens for both families on the first free port from `next` on. (Bound to a loopback address, it would be open to
/// one family only; a connection that was not handed over by the kernel program is recognised when it is accepted.)
fn listener(next: &mut u16) -> io::Result<std::net::TcpListener> {
    loop {
        let port = *next;
        *next = next.checked_add(1).ok_or(io::ErrorKind::AddrInUse)?;
        match bind(port) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            other => return other,
        }
    }
}

fn bind(port: u16) -> io::Result<std::net::TcpListener> {
    let (socket, addr) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        }
        // A kernel without IPv6.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => (
            Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?,
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        ),
        Err(error) => return Err(error),
    };
    socket.set_nonblocking(true)?;
    // Small answers must not wait for acknowledgements of earlier ones.
    socket.set_tcp_nodelay(true)?;
    // A captured connection occupies its redirected port at the pod's address. An application that says the same may
    // listen there all the same, as servers do.
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// An address of the node that an agent takes over from its predecessor: bound from the start, so that one that is taken by
/// something else is told at once, and listening once it serves. Two of them may listen at the same time; the kernel
/// spreads connections over them.
#[derive(Debug)]
pub struct NodePort {
    socket: Socket,
    addr: SocketAddr,
}

impl NodePort {
    /// Binds the address. `what` says what it is for.
    ///
    /// # Errors
    /// One line that names the address.
    pub fn bind(addr: SocketAddr, what: &str) -> anyhow::Result<Self> {
        let bound = (|| {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            socket.bind(&addr.into())?;
            io::Result::Ok(socket)
        })();
        Ok(Self { socket: bound.with_context(|| format!("listen on {addr} for {what}"))?, addr })
    }

    /// Accepts from now on.
    ///
    /// # Errors
    /// One line that names the address.
    pub fn listen(self) -> anyhow::Result<tokio::net::TcpListener> {
        let listening = self.socket.listen(1024).and_then(|()| tokio::net::TcpListener::from_std(self.socket.into()));
        listening.with_context(|| format!("listen on {}", self.addr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_gets_three_listeners_for_both_families_outside_the_ephemeral_ports() {
        let here = NetnsHandle::current().expect("this namespace");
        let sets = open(&here, 2).expect("listeners");
        let ports: Vec<u16> = sets
            .iter()
            .flat_map(|set| [&set.outbound, &set.tunnel, &set.plaintext])
            .map(|listener| listener.local_addr().expect("bound").port())
            .collect();
        assert_eq!(ports.len(), 6);
        assert!(ports.iter().all(|port| *port >= FIRST_PORT), "{ports:?}");
        for host in ["127.0.0.1", "[::1]"] {
            std::net::TcpStream::connect(format!("{host}:{}", ports[0])).expect("both families");
        }
        assert_eq!(open(&here, 1).expect("a second agent finds other ports").len(), 1);
        for (listener, linger) in [
            (&sets[0].outbound, Some(Duration::ZERO)),
            (&sets[0].tunnel, None),
            (&sets[0].plaintext, Some(Duration::ZERO)),
        ] {
            let addr = ("127.0.0.1", listener.local_addr().expect("bound").port());
            let _client = std::net::TcpStream::connect(addr).expect("connected");
            let accepted = loop {
                match listener.accept() {
                    Ok((accepted, _)) => break accepted,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            };
            let accepted = SockRef::from(&accepted);
            assert_eq!(accepted.linger().expect("option"), linger);
            assert!(accepted.tcp_nodelay().expect("option"));
            assert!(accepted.reuse_address().expect("option"));
        }
    }

    /// What another program has is told before anything else happens; what another agent has is shared.
    #[tokio::test]
    async fn a_port_of_the_node_is_handed_over() {
        let foreign = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let taken = foreign.local_addr().expect("bound");
        let error = format!("{:#}", NodePort::bind(taken, "readiness").expect_err("taken"));
        assert!(error.contains(&taken.to_string()) && error.contains("readiness"), "{error}");
        drop(foreign);

        let old = NodePort::bind(taken, "readiness").expect("free").listen().expect("listens");
        let new = NodePort::bind(taken, "readiness").expect("shared");
        // Bound is not listening: all connections still come to the old one.
        for _ in 0..16 {
            let client = std::net::TcpStream::connect(taken).expect("accepted");
            let (_, from) = old.accept().await.expect("by the old one");
            assert_eq!(from, client.local_addr().expect("bound"));
        }
        let new = new.listen().expect("listens");
        drop(old);
        let _client = std::net::TcpStream::connect(taken).expect("accepted");
        new.accept().await.expect("by the new one");
    }
}
