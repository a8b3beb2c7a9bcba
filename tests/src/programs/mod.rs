//! The programs of the sandbox's pods: plain blocking sockets of the standard library, which know nothing of a mesh.
//!
//! `culvert-pod` is their executable. Servers run until they are ended; clients print one line of JSON, whose type is
//! here too, so that a scenario reads the result instead of parsing text. A client exits 0 when it could tell what
//! happened, also if that was a refusal: a refusal is a result.

mod attack;
mod burst;
mod conversation;
mod cut;
mod exchange;
mod flood;
mod hammer;
mod hold;
mod http;
mod newcomer;
mod paced;
mod probe;
mod probed;
mod resolve;
mod short;
mod trickle;
mod udp;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use serde::{Deserialize, Serialize};

pub use attack::{AttackResult, Way};
pub use burst::{BurstResult, Quantiles};
pub use conversation::Conversation;
pub use cut::{CutResult, CutVerb};
pub use exchange::{ExchangeResult, Verb};
pub use flood::FloodResult;
pub use hammer::HammerResult;
pub use hold::HeldRound;
pub use http::{HttpResult, Seen};
pub use newcomer::{Heard, Word};
pub use paced::PacedResult;
pub use probe::{Probe, ProbeResult};
pub use probed::{ProbeKind, Probed};
pub use resolve::ResolveResult;
pub use short::ShortResult;
pub use trickle::{TrickleEvent, Trickled};
pub use udp::UdpResult;

/// What runs inside a pod of the sandbox.
#[derive(Parser, Debug)]
#[command(name = "culvert-pod", about = "Programs that run inside the sandbox's pods")]
pub enum Program {
    /// Do nothing: hold the pod's namespaces, as a pod's pause container does.
    Pause,
    /// Serve HTTP/1.1 on every given port; the answer tells what the server saw.
    HttpServe {
        /// The server's name in its answers.
        #[arg(long)]
        name: String,
        /// Ports, IPv4 and IPv6.
        #[arg(long = "port", required = true)]
        ports: Vec<u16>,
    },
    /// Make HTTP/1.1 requests, a connection each, and print a line of JSON per request.
    HttpGet {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Path of the request.
        #[arg(long, default_value = "/")]
        path: String,
        /// Text carried in a header of the request and sent back in the answer.
        #[arg(long, default_value = "")]
        marker: String,
        /// Limit of the whole exchange, milliseconds.
        #[arg(long, default_value_t = 3000)]
        timeout_ms: u64,
        /// Number of requests.
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Pause between them, milliseconds.
        #[arg(long, default_value_t = 0)]
        interval_ms: u64,
        /// End with the first that is answered.
        #[arg(long)]
        until_answered: bool,
    },
    /// Serve the exchange protocol: the client's first line says what happens on the connection.
    ExchangeServe {
        /// Ports, IPv4 and IPv6.
        #[arg(long = "port", required = true)]
        ports: Vec<u16>,
        /// Greet first, before the client has said anything.
        #[arg(long)]
        speak_first: bool,
    },
    /// Make one connection of the exchange protocol.
    Exchange {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// What to do.
        #[arg(long, value_enum)]
        verb: Verb,
        /// Bytes to move.
        #[arg(long, default_value_t = 1 << 20)]
        bytes: u64,
        /// Limit of a single read or write, milliseconds.
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
    },
    /// Open connections that ask for bytes and never read them; hold them until ended.
    Stall {
        /// Address and port of an exchange server.
        #[arg(long)]
        to: SocketAddr,
        /// Number of connections.
        #[arg(long, default_value_t = 1)]
        count: u32,
    },
    /// Hold one connection to an exchange server open, with a line there and back again and again, and tell each; ends
    /// with the connection.
    Hold {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Pause between rounds, milliseconds.
        #[arg(long, default_value_t = 20)]
        interval_ms: u64,
        /// Limit of a single read or write, milliseconds.
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
    },
    /// Make many short connections to an exchange server; count the errors.
    Short {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Number of connections.
        #[arg(long)]
        count: u64,
        /// How many at a time.
        #[arg(long, default_value_t = 8)]
        parallel: u32,
        /// Limit of a connection, milliseconds.
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
    },
    /// Open connections to an exchange server and hold them until a file exists.
    Flood {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Number of connections that are tried.
        #[arg(long)]
        count: u64,
        /// Say nothing on them.
        #[arg(long)]
        silent: bool,
        /// The file.
        #[arg(long)]
        until: PathBuf,
        /// Limit of a connect or a read, milliseconds.
        #[arg(long, default_value_t = 20_000)]
        timeout_ms: u64,
    },
    /// Make connections to an exchange server at a steady rate until a file exists; count the errors.
    Paced {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// New connections a second.
        #[arg(long)]
        rate: u32,
        /// How long each goes on, milliseconds; 0: one line.
        #[arg(long, default_value_t = 0)]
        live_ms: u64,
        /// The file.
        #[arg(long)]
        until: PathBuf,
        /// Limit of a connect or a read, milliseconds.
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
    },
    /// Make many connections to an exchange server at the same moment.
    Burst {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Number of connections.
        #[arg(long)]
        count: usize,
        /// Limit of a connection, milliseconds.
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
    },
    /// Serve connections that are cut off.
    CutServe {
        /// Ports, IPv4 and IPv6.
        #[arg(long = "port", required = true)]
        ports: Vec<u16>,
    },
    /// Make one connection that is cut off, and print what the side saw that did not cut.
    Cut {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Who cuts.
        #[arg(long, value_enum)]
        verb: CutVerb,
        /// Limit of a single read or write, milliseconds.
        #[arg(long, default_value_t = 5_000)]
        timeout_ms: u64,
    },
    /// Send a line to an exchange server again and again on one connection, and open it again when it is lost; print a line
    /// of JSON for everything that happens.
    Trickle {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// The line.
        #[arg(long)]
        marker: String,
        /// Pause between two lines, milliseconds.
        #[arg(long, default_value_t = 20)]
        interval_ms: u64,
        /// Limit of a connect or a read, milliseconds.
        #[arg(long, default_value_t = 3_000)]
        timeout_ms: u64,
    },
    /// Send every datagram back, with the address that it came from.
    UdpServe {
        /// Port, IPv4 and IPv6.
        #[arg(long)]
        port: u16,
    },
    /// Send a datagram to such a server, and check the answer.
    Udp {
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Bytes of the datagram.
        #[arg(long, default_value_t = 64)]
        bytes: usize,
        /// From a socket that is connected.
        #[arg(long)]
        connected: bool,
        /// Limit of the wait for the answer, milliseconds.
        #[arg(long, default_value_t = 2_000)]
        timeout_ms: u64,
    },
    /// Ask a name server for a name's IPv4 addresses, over UDP.
    Resolve {
        /// The whole name.
        #[arg(long)]
        name: String,
        /// Address and port of the name server.
        #[arg(long)]
        server: SocketAddr,
        /// Limit of the wait for the answer, milliseconds.
        #[arg(long, default_value_t = 5_000)]
        timeout_ms: u64,
    },
    /// Serve one kind of a kubelet's probes, and print a line of JSON for each client.
    Probed {
        /// What is asked.
        #[arg(long, value_enum)]
        kind: ProbeKind,
        /// Port, IPv4 and IPv6.
        #[arg(long)]
        port: u16,
    },
    /// Try to get something out of the pod past the mesh, and print what came of it.
    Attack {
        /// How.
        #[arg(long, value_enum)]
        way: Way,
        /// Address and port.
        #[arg(long)]
        to: SocketAddr,
        /// Text that is sent.
        #[arg(long)]
        marker: String,
        /// Somebody else's address, for the ways that pretend.
        #[arg(long)]
        from: Option<IpAddr>,
        /// Port to bind to, for the way that does.
        #[arg(long, default_value_t = 0)]
        from_port: u16,
        /// Limit of a connect or a read, milliseconds.
        #[arg(long, default_value_t = 5_000)]
        timeout_ms: u64,
    },
    /// Say a line before anything else, and again until it comes back; print a line of JSON for each time.
    FirstWord {
        /// Address and port of one that listens.
        #[arg(long)]
        to: SocketAddr,
        /// The line.
        #[arg(long)]
        marker: String,
        /// Pause between two times, milliseconds.
        #[arg(long, default_value_t = 25)]
        interval_ms: u64,
        /// Limit of a connect or a read, milliseconds.
        #[arg(long, default_value_t = 2_000)]
        timeout_ms: u64,
        /// Do nothing any more afterwards, instead of ending.
        #[arg(long)]
        stay: bool,
    },
    /// Listen before anything else, print a line of JSON for all that comes, and send it back.
    Listen {
        /// Port, IPv4 and IPv6.
        #[arg(long)]
        port: u16,
    },
    /// Connect to addresses again and again, whether anybody is there or not, and say a line wherever that succeeds.
    Hammer {
        /// Addresses and ports.
        #[arg(long, required = true, value_delimiter = ',')]
        to: Vec<SocketAddr>,
        /// The line.
        #[arg(long)]
        marker: String,
        /// How often each is tried; without end unless it is said.
        #[arg(long)]
        rounds: Option<u32>,
        /// Pause between two tries of an address, milliseconds.
        #[arg(long, default_value_t = 50)]
        interval_ms: u64,
        /// Limit of a connect or a read, milliseconds.
        #[arg(long, default_value_t = 50)]
        timeout_ms: u64,
    },
    /// Probe pods as a kubelet does: HTTP GET, again and again, each result a line in a file.
    Kubelet {
        /// `pod=address:port`, repeated.
        #[arg(long = "probe", required = true)]
        probes: Vec<Probe>,
        /// Pause between rounds, milliseconds.
        #[arg(long, default_value_t = 500)]
        period_ms: u64,
        /// File to append results to.
        #[arg(long)]
        out: PathBuf,
    },
}

impl Program {
    /// Runs the program.
    ///
    /// # Errors
    /// A server could not listen, or a result could not be written.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Pause => loop {
                std::thread::park();
            },
            Self::HttpServe { name, ports } => http::serve(&name, &ports),
            Self::HttpGet { to, path, marker, timeout_ms, count, interval_ms, until_answered } => {
                let (limit, interval) = (Duration::from_millis(timeout_ms), Duration::from_millis(interval_ms));
                let times = http::Times { count, interval, until_answered };
                http::get_many(to, &path, &marker, limit, &times)
            }
            Self::ExchangeServe { ports, speak_first } => exchange::serve(&ports, speak_first),
            Self::Exchange { to, verb, bytes, timeout_ms } => {
                print(&exchange::call(to, verb, bytes, Duration::from_millis(timeout_ms)))
            }
            Self::Stall { to, count } => exchange::stall(to, count),
            Self::Hold { to, interval_ms, timeout_ms } => {
                hold::run(to, Duration::from_millis(interval_ms), Duration::from_millis(timeout_ms))
            }
            Self::Short { to, count, parallel, timeout_ms } => {
                print(&short::run(to, count, parallel, Duration::from_millis(timeout_ms)))
            }
            Self::Flood { to, count, silent, until, timeout_ms } => {
                flood::run(to, count, silent, &until, Duration::from_millis(timeout_ms))
            }
            Self::Paced { to, rate, live_ms, until, timeout_ms } => {
                let (live, limit) = (Duration::from_millis(live_ms), Duration::from_millis(timeout_ms));
                print(&paced::run(paced::Pace { to, rate, live, limit }, &until)?)
            }
            Self::Burst { to, count, timeout_ms } => print(&burst::run(to, count, Duration::from_millis(timeout_ms))?),
            Self::CutServe { ports } => cut::serve(&ports),
            Self::Cut { to, verb, timeout_ms } => print(&cut::call(to, verb, Duration::from_millis(timeout_ms))),
            Self::Trickle { to, marker, interval_ms, timeout_ms } => {
                trickle::run(to, &marker, Duration::from_millis(interval_ms), Duration::from_millis(timeout_ms))
            }
            Self::UdpServe { port } => udp::serve(port),
            Self::Udp { to, bytes, connected, timeout_ms } => {
                print(&udp::call(to, bytes, connected, Duration::from_millis(timeout_ms)))
            }
            Self::Resolve { name, server, timeout_ms } => {
                print(&resolve::ask(server, &name, Duration::from_millis(timeout_ms)))
            }
            Self::Probed { kind, port } => probed::serve(kind, port),
            Self::Attack { way, to, marker, from, from_port, timeout_ms } => {
                let limit = Duration::from_millis(timeout_ms);
                print(&attack::run(&attack::Attack { way, to, marker, from, from_port, limit }))
            }
            Self::FirstWord { to, marker, interval_ms, timeout_ms, stay } => {
                let (pause, limit) = (Duration::from_millis(interval_ms), Duration::from_millis(timeout_ms));
                newcomer::speak(to, &marker, pause, limit, stay)
            }
            Self::Listen { port } => newcomer::hear(port),
            Self::Hammer { to, marker, rounds, interval_ms, timeout_ms } => {
                let (interval, limit) = (Duration::from_millis(interval_ms), Duration::from_millis(timeout_ms));
                hammer::run(&to, &hammer::Blows { marker, rounds, interval, limit })
            }
            Self::Kubelet { probes, period_ms, out } => probe::run(&probes, Duration::from_millis(period_ms), &out),
        }
    }
}

/// How a connection failed, as a program sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// connect() said ECONNREFUSED.
    Refused,
    /// connect() said EPERM or EACCES.
    NotPermitted,
    /// The connection was open and was reset.
    Reset,
    /// Nothing came within the limit.
    TimedOut,
    /// The peer closed before the exchange was complete.
    ClosedEarly,
    /// No route, or the address cannot be reached.
    Unreachable,
    /// Bytes arrived that were not the ones sent.
    Corrupt,
    /// Anything else; the text says what.
    Other,
}

impl Failure {
    /// The failure that an error of a socket means.
    pub fn of(error: &io::Error) -> Self {
        use io::ErrorKind as K;
        match error.kind() {
            K::ConnectionRefused => Self::Refused,
            K::PermissionDenied => Self::NotPermitted,
            K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe => Self::Reset,
            K::TimedOut | K::WouldBlock => Self::TimedOut,
            K::UnexpectedEof => Self::ClosedEarly,
            K::NetworkUnreachable | K::HostUnreachable | K::AddrNotAvailable => Self::Unreachable,
            K::InvalidData => Self::Corrupt,
            _ => Self::Other,
        }
    }
}

/// One word for a table.
impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused",
            Self::NotPermitted => "not permitted",
            Self::Reset => "reset",
            Self::TimedOut => "timed out",
            Self::ClosedEarly => "closed early",
            Self::Unreachable => "unreachable",
            Self::Corrupt => "corrupt",
            Self::Other => "failed",
        })
    }
}

fn print<T: Serialize>(result: &T) -> Result<()> {
    use std::io::Write;
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(result)?)?;
    out.flush()?;
    Ok(())
}

/// The address as a person writes it: a v4-mapped IPv6 address is shown as IPv4.
fn plain(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
