//! One CONNECT stream over mutual TLS, and the pool of connections that carry such streams.
//!
//! Knows HTTP/2 and rustls; pods, policy and who may speak to whom are the caller's. Certificates are chosen and
//! verified inside the rustls configurations that the caller passes in. A connection lives on one thread from accept
//! to end, so nothing here is `Send`; every task has an owner that awaits it: the [`Pool`], or [`server::serve`].
//!
//! [`Stream`] is what both ends hand out and all that the copy loop knows. HBONE (module `hbone`) is the one kind of
//! tunnel today; another kind is another variant of it.

mod account;
mod authority;
mod hbone;
pub mod headers;
mod pool;
pub mod server;
mod stream;
#[cfg(test)]
mod testing;
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests;

pub use self::{
    account::{Account, Charge},
    authority::{Authority, AuthorityError, Host},
    pool::{Config, Connect, OpenError, Pool, PoolKey},
    stream::{ReadHalf, Stream, StreamError, WriteHalf, code},
};

/// What a tunnel costs beside what its streams hold, in bytes, roughly: our part and the kernel's part of its socket.
pub const TUNNEL_BYTES: usize = 16 << 10;

/// Tunnels of one source in which there is nothing that are kept, at most; they stand for five minutes.
pub const IDLE_TUNNELS: usize = 512;

/// Answer header of a refused CONNECT: a word on why, for the log of the other side ([`OpenError::Refused`]).
pub const REASON_HEADER: &str = "x-culvert-reason";
