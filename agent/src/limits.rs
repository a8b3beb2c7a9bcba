//! What one pod, and one peer, may take of the agent, so that the others keep theirs.
//!
//! Who is over a limit is refused with a [`Limit`] as the reason; what is open stays. The numbers are shared by all workers
//! and may change while the agent runs. How much the streams of a pod hold is counted by [`crate::tunnel::Account`].

use std::{
    collections::HashMap,
    fmt, io,
    net::IpAddr,
    os::fd::RawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::tunnel::{Account, Charge};

/// What a connection costs beside the bytes that it holds, roughly: our part and the kernel's part of its sockets.
const CONNECTION_BYTES: usize = 8 << 10;

/// The numbers that an operator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Connections that a pod has open: those that it made; those that were made to it, for each client address.
    pub connections_per_pod: usize,
    /// Bytes that the agent holds for a pod.
    pub memory_per_pod: usize,
    /// Tunnels from one address in which nothing has been asked for yet.
    pub handshakes_per_peer: usize,
    /// Descriptors that are kept for pods with less than their share.
    pub open_files_reserve: usize,
}

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `max-connections-per-pod`
    Connections,
    /// `max-memory-per-pod`
    Memory,
    /// `max-handshakes-per-peer`
    Handshakes,
    /// `open-files-reserve`
    OpenFiles,
}

impl Limit {
    /// The word of logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connection-limit",
            Self::Memory => "memory-limit",
            Self::Handshakes => "handshake-limit",
            Self::OpenFiles => "open-files-limit",
        }
    }

    /// The setting that would have to be another one.
    pub fn setting(self) -> &'static str {
        match self {
            Self::Connections => "max-connections-per-pod",
            Self::Memory => "max-memory-per-pod",
            Self::Handshakes => "max-handshakes-per-peer",
            Self::OpenFiles => "max-open-files",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "over the limit that --{} sets", self.setting())
    }
}

/// The limits in force, and what counts against them node-wide.
#[derive(Debug)]
pub struct Limits {
    connections: AtomicUsize,
    memory: Arc<AtomicUsize>,
    handshakes: AtomicUsize,
    reserve: AtomicUsize,
    /// Descriptors that this process may have.
    files: usize,
    /// Pods among which they are shared.
    pods: AtomicUsize,
    peers: Mutex<HashMap<IpAddr, usize>>,
}

impl Limits {
    /// `files` is what [`raise_open_files`] gave.
    pub fn new(numbers: Numbers, files: usize) -> Arc<Self> {
        let limits = Self {
            connections: AtomicUsize::new(0),
            memory: Arc::default(),
            handshakes: AtomicUsize::new(0),
            reserve: AtomicUsize::new(0),
            files,
            pods: AtomicUsize::new(1),
            peers: Mutex::default(),
        };
        limits.set(numbers);
        Arc::new(limits)
    }

    /// Puts other numbers in force, for connections to come.
    pub fn set(&self, numbers: Numbers) {
        self.connections.store(numbers.connections_per_pod, Ordering::Relaxed);
        self.memory.store(numbers.memory_per_pod, Ordering::Relaxed);
        self.handshakes.store(numbers.handshakes_per_peer, Ordering::Relaxed);
        // Where there are few, a quarter of them.
        self.reserve.store(numbers.open_files_reserve.min(self.files / 4), Ordering::Relaxed);
    }

    /// How many pods share the descriptors.
    pub fn share_among(&self, pods: usize) {
        self.pods.store(pods.max(1), Ordering::Relaxed);
    }

    /// What a pod has, to begin with.
    pub fn load(self: &Arc<Self>) -> Arc<Load> {
        Arc::new(Load {
            account: Arc::new(Account::new(self.memory.clone())),
            outbound: AtomicUsize::new(0),
            inbound: Mutex::default(),
            limits: self.clone(),
        })
    }

    /// Counts a tunnel from `peer` until the guard is dropped, which is when something is asked for in it.
    ///
    /// # Errors
    /// There are as many of them as there may be.
    pub fn handshake(self: &Arc<Self>, peer: IpAddr) -> Result<Handshake, Limit> {
        let mut peers = lock(&self.peers);
        let count = peers.entry(peer).or_default();
        if *count >= self.handshakes.load(Ordering::Relaxed) {
            return Err(Limit::Handshakes);
        }
        *count += 1;
        Ok(Handshake { limits: self.clone(), peer })
    }
}

/// See [`Limits::handshake`].
#[derive(Debug)]
pub struct Handshake {
    limits: Arc<Limits>,
    peer: IpAddr,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        give_back(&mut lock(&self.limits.peers), self.peer);
    }
}

/// What one pod has of the agent, on all workers.
#[derive(Debug)]
pub struct Load {
    account: Arc<Account>,
    outbound: AtomicUsize,
    inbound: Mutex<HashMap<IpAddr, usize>>,
    limits: Arc<Limits>,
}

impl Load {
    /// Takes a place for a connection that the pod has made and whose socket is `fd`.
    ///
    /// # Errors
    /// The limit that the pod has reached.
    pub fn outbound(self: &Arc<Self>, fd: RawFd) -> Result<Place, Limit> {
        let most = self.limits.connections.load(Ordering::Relaxed);
        let others = self.outbound.fetch_add(1, Ordering::Relaxed);
        // Gives it back, whatever comes.
        let place = Place { load: self.clone(), client: None };
        if others >= most {
            return Err(Limit::Connections);
        }
        self.check(others, fd)?;
        Ok(place)
    }

    /// Takes a place for a connection that `client` has made to the pod. The number is counted for each client, since it is
    /// the client that causes it; `fd` is as above, if there is a socket already.
    ///
    /// # Errors
    /// The limit that was reached.
    pub fn inbound(self: &Arc<Self>, client: IpAddr, fd: Option<RawFd>) -> Result<Place, Limit> {
        let most = self.limits.connections.load(Ordering::Relaxed);
        let others = {
            let mut inbound = lock(&self.inbound);
            let count = inbound.entry(client).or_default();
            *count += 1;
            *count - 1
        };
        let place = Place { load: self.clone(), client: Some(client) };
        if others >= most {
            return Err(Limit::Connections);
        }
        self.check(others, fd.unwrap_or(0))?;
        Ok(place)
    }

    /// A stream's part of what is held for the pod.
    pub fn charge(&self) -> Charge {
        Charge::new(self.account.clone())
    }

    /// Connections that are open now: made by the pod, and made to it.
    pub fn connections(&self) -> (usize, usize) {
        (self.outbound.load(Ordering::Relaxed), lock(&self.inbound).values().sum())
    }

    /// Bytes that the agent holds for the pod, roughly.
    pub fn memory(&self) -> usize {
        let (outbound, inbound) = self.connections();
        self.account.used() + (outbound + inbound) * CONNECTION_BYTES
    }

    fn check(&self, others: usize, fd: RawFd) -> Result<(), Limit> {
        let limits = &self.limits;
        if self.memory() > limits.memory.load(Ordering::Relaxed) {
            return Err(Limit::Memory);
        }
        // The kernel gives the lowest number that is free: one as high as this says that all below are in use. Then those
        // go on who have less than their share; a connection takes two descriptors at most.
        let for_all = limits.files.saturating_sub(limits.reserve.load(Ordering::Relaxed));
        let share = for_all / 2 / limits.pods.load(Ordering::Relaxed);
        if usize::try_from(fd).is_ok_and(|fd| fd >= for_all) && others >= share {
            return Err(Limit::OpenFiles);
        }
        Ok(())
    }
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    load: Arc<Load>,
    /// For one that was made to the pod.
    client: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        match self.client {
            None => drop(self.load.outbound.fetch_sub(1, Ordering::Relaxed)),
            Some(client) => give_back(&mut lock(&self.load.inbound), client),
        }
    }
}

fn give_back(counts: &mut HashMap<IpAddr, usize>, of: IpAddr) {
    if let Some(count) = counts.get_mut(&of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&of);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Raises the number of files that this process may open to `wanted`, or as far as it goes, and gives what it is now.
///
/// # Errors
/// The kernel does not say what it is, or refuses.
pub fn raise_open_files(wanted: Option<usize>) -> io::Result<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live value of the type that the call fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = match wanted {
        Some(wanted) => limit.rlim_max.min(wanted as libc::rlim_t),
        None => limit.rlim_max,
    };
    // SAFETY: `limit` is a live value of the type that the call reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn numbers() -> Numbers {
        Numbers { connections_per_pod: 3, memory_per_pod: 1 << 20, handshakes_per_peer: 2, open_files_reserve: 20 }
    }

    #[test]
    fn a_pod_at_its_limit_is_refused_until_a_connection_ends_and_its_neighbour_is_not() {
        let limits = Limits::new(numbers(), 1000);
        let (greedy, neighbour) = (limits.load(), limits.load());
        let mut places: Vec<Place> = (0..3).map(|_| greedy.outbound(5).expect("room")).collect();
        assert_eq!(greedy.outbound(5).err(), Some(Limit::Connections));
        assert_eq!(greedy.connections(), (3, 0), "who was refused holds no place");
        let _of_neighbour = neighbour.outbound(5).expect("its own room");
        // Made to it: each client has its own number.
        let _held: Vec<Place> = (0..3).map(|_| greedy.inbound(CLIENT, None).expect("room")).collect();
        assert_eq!(greedy.inbound(CLIENT, None).err(), Some(Limit::Connections));
        greedy.inbound(OTHER, None).expect("another client's room");
        places.pop();
        greedy.outbound(5).expect("room again");
        limits.set(Numbers { connections_per_pod: 1, ..numbers() });
        assert_eq!(greedy.outbound(5).err(), Some(Limit::Connections), "the new number holds");
        assert_eq!(greedy.connections(), (2, 3), "what is open stays");
    }

    #[test]
    fn memory_counts_connections_and_what_they_hold() {
        let limits = Limits::new(Numbers { connections_per_pod: 1000, ..numbers() }, 1000);
        let load = limits.load();
        let held: Vec<Place> = std::iter::from_fn(|| load.outbound(5).ok()).collect();
        assert_eq!(held.len(), (1 << 20) / CONNECTION_BYTES);
        assert_eq!(load.outbound(5).err(), Some(Limit::Memory));
        drop(held);
        assert_eq!(load.memory(), 0);
    }

    #[test]
    fn the_last_descriptors_are_for_pods_with_less_than_their_share() {
        let limits = Limits::new(Numbers { connections_per_pod: 1000, ..numbers() }, 100);
        limits.share_among(4);
        let (greedy, modest) = (limits.load(), limits.load());
        // 80 for all, 40 connections, 10 for each of four pods.
        let _held: Vec<Place> = (0..30).map(|fd| greedy.outbound(fd).expect("room")).collect();
        assert_eq!(greedy.outbound(80).err(), Some(Limit::OpenFiles));
        let _held: Vec<Place> = (0..10).map(|_| modest.outbound(80).expect("its share")).collect();
        assert_eq!(modest.outbound(80).err(), Some(Limit::OpenFiles));
        greedy.outbound(79).expect("a number below says that there is room again");
    }

    #[test]
    fn handshakes_are_counted_for_each_peer() {
        let limits = Limits::new(numbers(), 1000);
        let first = limits.handshake(CLIENT).expect("room");
        let _second = limits.handshake(CLIENT).expect("room");
        assert_eq!(limits.handshake(CLIENT).err(), Some(Limit::Handshakes));
        limits.handshake(OTHER).expect("another peer's room");
        drop(first);
        limits.handshake(CLIENT).expect("room again");
        assert_eq!(lock(&limits.peers).len(), 1, "who has none takes no memory");
    }

    #[test]
    fn the_limit_of_open_files_is_raised() {
        let now = raise_open_files(None).expect("known");
        assert!(now > 64);
        assert_eq!(raise_open_files(Some(now)).expect("known"), now);
    }
}
