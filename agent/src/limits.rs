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

use crate::tunnel::{Account, Charge, IDLE_TUNNELS, TUNNEL_BYTES};

/// What a connection costs beside the bytes that it holds, roughly: our part and the kernel's part of its sockets.
const CONNECTION_BYTES: usize = 8 << 10;

/// The numbers that an operator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Connections that a pod has open: those that it made; those that were made to it, for each client.
    pub connections_per_pod: usize,
    /// Bytes that the agent holds for a pod.
    pub memory_per_pod: usize,
    /// Tunnels from one peer in which nothing has been asked for yet; to one pod five times as many at most.
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
    peers: Mutex<HashMap<Host, usize>>,
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
            inbound: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            handshakes: AtomicUsize::new(0),
            clients: Mutex::default(),
            limits: self.clone(),
        })
    }

    /// Descriptors that are not kept for those with less than their share.
    fn for_all(&self) -> usize {
        self.files.saturating_sub(self.reserve.load(Ordering::Relaxed))
    }
}

/// Who counts as one: an address, but in IPv6 all the addresses that one machine may take (a /64), unless a pod is known to
/// have this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    address: IpAddr,
    is_pod: bool,
}

impl Host {
    /// At `address`, which is that of a pod of the mesh or of anybody else.
    pub fn at(address: IpAddr, is_pod: bool) -> Self {
        let address = match address {
            IpAddr::V6(v6) if !is_pod => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
            address => address,
        };
        Self { address, is_pod }
    }
}

/// A tunnel to a pod in which nothing has been asked for yet; counted until it is dropped.
#[derive(Debug)]
pub struct Handshake {
    load: Arc<Load>,
    peer: Host,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.load.handshakes.fetch_sub(1, Ordering::Relaxed);
        let mut peers = lock(&self.load.limits.peers);
        if let Some(count) = peers.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

/// What one pod has of the agent, on all workers.
#[derive(Debug)]
pub struct Load {
    account: Arc<Account>,
    outbound: AtomicUsize,
    inbound: AtomicUsize,
    /// That lead to it.
    tunnels: AtomicUsize,
    /// Of those, in which nothing has been asked for yet.
    handshakes: AtomicUsize,
    clients: Mutex<HashMap<Host, Arc<Client>>>,
    limits: Arc<Limits>,
}

/// What one client has of the agent for a pod that it has connected to; there as long as it has anything.
#[derive(Debug)]
struct Client {
    host: Host,
    /// A part of the pod's.
    account: Arc<Account>,
    connections: AtomicUsize,
    tunnels: AtomicUsize,
}

impl Load {
    /// Takes a place for a connection that the pod has made and whose socket is `fd`.
    ///
    /// # Errors
    /// The limit that the pod has reached.
    pub fn outbound(self: &Arc<Self>, fd: RawFd) -> Result<Place, Limit> {
        let before = self.outbound.fetch_add(1, Ordering::Relaxed);
        let place = Place::new(self, Of::Pod, before)?;
        place.may_have(fd)?;
        Ok(place)
    }

    /// Takes a place for a connection that `client` has made to the pod. The number is counted for each client, since it is
    /// the client that causes it. Whether there is a descriptor for it is asked once there is: [`Place::may_have`].
    ///
    /// # Errors
    /// The limit that was reached.
    pub fn inbound(self: &Arc<Self>, client: Host) -> Result<Place, Limit> {
        let (client, before) = self.count(client, |client| &client.connections);
        self.inbound.fetch_add(1, Ordering::Relaxed);
        Place::new(self, Of::Connection(client), before)
    }

    /// Takes a place for a tunnel to the pod that `client` begins and whose socket is `fd`, of which a client may have as
    /// many as connections, and as it may keep without any; and counts it as one in which nothing was asked for until that guard is dropped.
    ///
    /// # Errors
    /// The limit that was reached.
    pub fn tunnel(self: &Arc<Self>, client: Host, fd: RawFd) -> Result<(Place, Handshake), Limit> {
        let waiting = self.handshake(client)?;
        let (client, before) = self.count(client, |client| &client.tunnels);
        self.tunnels.fetch_add(1, Ordering::Relaxed);
        let place = Place::new(self, Of::Tunnel(client), before)?;
        place.may_have(fd)?;
        Ok((place, waiting))
    }

    /// Each peer has its number, node-wide. One pod has four times that for all who dial it, and once more for pods that
    /// have none under way: however many there are who only begin, the mesh gets through.
    fn handshake(self: &Arc<Self>, peer: Host) -> Result<Handshake, Limit> {
        let each = self.limits.handshakes.load(Ordering::Relaxed);
        let mut peers = lock(&self.limits.peers);
        let others = peers.get(&peer).copied().unwrap_or(0);
        // Changes only while the lock is held, or downwards.
        let all = self.handshakes.load(Ordering::Relaxed);
        let most =
            if all < each.saturating_mul(4) { each } else { usize::from(peer.is_pod && all < each.saturating_mul(5)) };
        if others >= most {
            return Err(Limit::Handshakes);
        }
        peers.insert(peer, others + 1);
        self.handshakes.fetch_add(1, Ordering::Relaxed);
        Ok(Handshake { load: self.clone(), peer })
    }

    /// Counts one more for a client, and gives how many there were.
    fn count(&self, host: Host, which: impl Fn(&Client) -> &AtomicUsize) -> (Arc<Client>, usize) {
        let new = || {
            Arc::new(Client {
                host,
                account: Arc::new(Account::part_of(&self.account)),
                connections: AtomicUsize::new(0),
                tunnels: AtomicUsize::new(0),
            })
        };
        let mut clients = lock(&self.clients);
        let client = clients.entry(host).or_insert_with(new).clone();
        let before = which(&client).fetch_add(1, Ordering::Relaxed);
        (client, before)
    }

    /// A part of what is held for the pod on its own behalf.
    pub fn charge(&self) -> Charge {
        Charge::new(self.account.clone())
    }

    /// All that is held for the pod.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Connections that are open now: made by the pod, and made to it.
    pub fn connections(&self) -> (usize, usize) {
        (self.outbound.load(Ordering::Relaxed), self.inbound.load(Ordering::Relaxed))
    }

    /// Whether only the reserve of descriptors is left: the kernel gives the lowest number that is free, so that one as
    /// high as `fd` says that all below are in use.
    pub fn is_scarce(&self, fd: RawFd) -> bool {
        usize::try_from(fd).is_ok_and(|fd| fd >= self.limits.for_all())
    }
}

/// Whom a place is for.
#[derive(Debug)]
enum Of {
    /// A connection that the pod has made.
    Pod,
    /// One that was made to it.
    Connection(Arc<Client>),
    /// A tunnel to it.
    Tunnel(Arc<Client>),
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    load: Arc<Load>,
    of: Of,
}

impl Place {
    /// Of what has been counted, beside `others` of its kind.
    fn new(load: &Arc<Load>, of: Of, others: usize) -> Result<Self, Limit> {
        // Gives it back, whatever comes.
        let place = Self { load: load.clone(), of };
        place.account().take(place.cost());
        let connections = load.limits.connections.load(Ordering::Relaxed);
        let most = match &place.of {
            Of::Pod | Of::Connection(_) => connections,
            Of::Tunnel(_) => connections.saturating_add(IDLE_TUNNELS),
        };
        if others >= most {
            return Err(Limit::Connections);
        }
        if place.account().is_full() {
            return Err(Limit::Memory);
        }
        Ok(place)
    }

    /// A part of what is held for this connection.
    pub fn charge(&self) -> Charge {
        Charge::new(self.account().clone())
    }

    /// Whether the connection may have a descriptor, `fd`, that it has got: of the last ones only those get some who have
    /// less than their share. A connection takes two at most.
    ///
    /// # Errors
    /// It may not.
    pub fn may_have(&self, fd: RawFd) -> Result<(), Limit> {
        let load = &self.load;
        if !load.is_scarce(fd) {
            return Ok(());
        }
        let share = load.limits.for_all() / 2 / load.limits.pods.load(Ordering::Relaxed);
        let over = match &self.of {
            Of::Pod => load.outbound.load(Ordering::Relaxed) > share,
            // What is the pod's share is shared by its clients.
            Of::Connection(client) | Of::Tunnel(client) => {
                let all = load.inbound.load(Ordering::Relaxed) + load.tunnels.load(Ordering::Relaxed);
                let of_client = client.connections.load(Ordering::Relaxed) + client.tunnels.load(Ordering::Relaxed);
                all > share && of_client > (share / lock(&load.clients).len().max(1)).max(1)
            }
        };
        if over { Err(Limit::OpenFiles) } else { Ok(()) }
    }

    fn account(&self) -> &Arc<Account> {
        match &self.of {
            Of::Pod => &self.load.account,
            Of::Connection(client) | Of::Tunnel(client) => &client.account,
        }
    }

    /// Bytes.
    fn cost(&self) -> usize {
        match &self.of {
            Of::Pod | Of::Connection(_) => CONNECTION_BYTES,
            Of::Tunnel(_) => TUNNEL_BYTES,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.account().give_back(self.cost());
        let load = &self.load;
        let (client, all, of_client) = match &self.of {
            Of::Pod => {
                load.outbound.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            Of::Connection(client) => (client, &load.inbound, &client.connections),
            Of::Tunnel(client) => (client, &load.tunnels, &client.tunnels),
        };
        all.fetch_sub(1, Ordering::Relaxed);
        // Counted under the lock, so that nobody counts for a client that is just forgotten.
        let mut clients = lock(&load.clients);
        of_client.fetch_sub(1, Ordering::Relaxed);
        if client.connections.load(Ordering::Relaxed) + client.tunnels.load(Ordering::Relaxed) == 0 {
            clients.remove(&client.host);
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

    fn pod(number: u8) -> Host {
        Host::at([10, 0, 0, number].into(), true)
    }

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
        let held: Vec<Place> = (0..3).map(|_| greedy.inbound(pod(1)).expect("room")).collect();
        assert_eq!(greedy.inbound(pod(1)).err(), Some(Limit::Connections));
        greedy.inbound(pod(2)).expect("another client's room");
        places.pop();
        greedy.outbound(5).expect("room again");
        limits.set(Numbers { connections_per_pod: 1, ..numbers() });
        assert_eq!(greedy.outbound(5).err(), Some(Limit::Connections), "the new number holds");
        assert_eq!(greedy.connections(), (2, 3), "what is open stays");
        drop((places, held));
        assert_eq!(
            (greedy.connections(), lock(&greedy.clients).len()),
            ((0, 0), 0),
            "nothing is kept of who has nothing"
        );
    }

    #[test]
    fn memory_counts_connections_tunnels_and_what_they_hold() {
        let limits = Limits::new(Numbers { connections_per_pod: 1000, ..numbers() }, 1000);
        let load = limits.load();
        let held: Vec<Place> = std::iter::from_fn(|| load.outbound(5).ok()).collect();
        assert_eq!(held.len(), (1 << 20) / CONNECTION_BYTES);
        assert_eq!(load.outbound(5).err(), Some(Limit::Memory));
        assert_eq!(load.inbound(pod(1)).err(), Some(Limit::Memory));
        assert_eq!(load.tunnel(pod(1), 5).err(), Some(Limit::Memory));
        drop(held);
        assert_eq!(load.account.used(), 0);
        let charge = load.charge();
        charge.hold(1 << 20);
        assert_eq!(load.outbound(5).err(), Some(Limit::Memory));
        charge.hold(0);
        let (tunnel, _) = load.tunnel(pod(1), 5).expect("room");
        assert_eq!(load.account.used(), TUNNEL_BYTES);
        drop(tunnel);
        assert_eq!(load.account.used(), 0);
    }

    /// Whoever comes next has room at a server, whatever those have taken who were there first.
    #[test]
    fn clients_within_their_limits_leave_room_for_another() {
        let limits = Limits::new(Numbers { connections_per_pod: 100, ..numbers() }, 1000);
        let server = limits.load();
        let fill = |client| std::iter::from_fn(|| server.inbound(client).ok()).collect::<Vec<Place>>();
        // There is room for 128.
        let first = fill(pod(1));
        let second = fill(pod(2));
        assert_eq!((first.len(), second.len()), (64, 32));
        assert_eq!(server.inbound(pod(1)).err(), Some(Limit::Memory));
        let mut third = fill(pod(3));
        assert_eq!(third.len(), 16, "a newcomer has room");
        server.inbound(pod(4)).expect("and the next");
        server.outbound(5).expect("and the pod itself");
        // What a client holds in its connections is its own as well.
        drop(third.split_off(4));
        let charge = third[0].charge();
        charge.hold(12 * CONNECTION_BYTES);
        assert_eq!(server.inbound(pod(3)).err(), Some(Limit::Memory));
        server.inbound(pod(4)).expect("room for who holds nothing");
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

    /// A server's share is for its clients, in equal parts.
    #[test]
    fn the_last_descriptors_of_a_server_are_for_clients_with_less_than_their_part() {
        let limits = Limits::new(Numbers { connections_per_pod: 1000, ..numbers() }, 100);
        limits.share_among(4);
        let server = limits.load();
        let connection = |client: Host, fd: RawFd| {
            let place = server.inbound(client).expect("room");
            place.may_have(fd).map(|()| place)
        };
        let _tunnel = server.tunnel(pod(1), 80).expect("the first");
        let _held: Vec<Place> = (0..9).map(|_| connection(pod(1), 80).expect("the whole share of one")).collect();
        assert_eq!(connection(pod(1), 80).err(), Some(Limit::OpenFiles));
        assert_eq!(server.tunnel(pod(1), 80).err(), Some(Limit::OpenFiles), "tunnels have descriptors, too");
        connection(pod(1), 79).expect("a number below says that there is room again");
        let _held: Vec<Place> = (0..5).map(|_| connection(pod(2), 80).expect("half of the share")).collect();
        assert_eq!(connection(pod(2), 80).err(), Some(Limit::OpenFiles));
        server.tunnel(pod(3), 80).expect("a newcomer's tunnel");
        connection(pod(3), 80).expect("a newcomer's connection");
    }

    #[test]
    fn handshakes_are_counted_for_each_peer() {
        let limits = Limits::new(numbers(), 1000);
        let (server, other) = (limits.load(), limits.load());
        let first = server.tunnel(pod(1), 5).expect("room");
        let _second = other.tunnel(pod(1), 5).expect("room");
        assert_eq!(server.tunnel(pod(1), 5).err(), Some(Limit::Handshakes), "whichever pod it dials");
        server.tunnel(pod(2), 5).expect("another peer's room");
        let (_place, waiting) = first;
        drop(waiting);
        server.tunnel(pod(1), 5).expect("room again, once something was asked for");
        assert_eq!(lock(&limits.peers).len(), 1, "who has none takes no memory");
    }

    /// A machine in IPv6 has more addresses than there can be numbers for.
    #[test]
    fn addresses_of_one_machine_count_as_one_peer_unless_they_are_pods() {
        let limits = Limits::new(numbers(), 1000);
        let server = limits.load();
        let host = |text: &str, is_pod| Host::at(text.parse().expect("an address"), is_pod);
        let _held = ["2001:db8::1", "2001:db8::2:0:0:1"].map(|text| server.tunnel(host(text, false), 5).expect("room"));
        assert_eq!(server.tunnel(host("2001:db8::ffff:0:0:3", false), 5).err(), Some(Limit::Handshakes));
        server.tunnel(host("2001:db8:0:1::1", false), 5).expect("another network's");
        server.tunnel(host("2001:db8::3", true), 5).expect("a pod's own");
        for last in 3..7 {
            assert_eq!(
                Host::at([10, 0, 0, last].into(), false),
                Host { address: [10, 0, 0, last].into(), is_pod: false }
            );
        }
    }

    /// However many peers begin and say nothing, a pod of the mesh that has not begun gets through.
    #[test]
    fn handshakes_of_all_peers_together_are_bounded() {
        let limits = Limits::new(numbers(), 1000);
        let (server, other) = (limits.load(), limits.load());
        let stranger = |n: u8| Host::at([192, 0, 2, n].into(), false);
        let held: Vec<_> = (0..8).map(|n| server.tunnel(stranger(n), 5).expect("room")).collect();
        assert_eq!(server.tunnel(stranger(9), 5).err(), Some(Limit::Handshakes));
        other.tunnel(stranger(9), 5).expect("to another pod");
        let first = server.tunnel(pod(1), 5).expect("a pod's first");
        assert_eq!(server.tunnel(pod(1), 5).err(), Some(Limit::Handshakes), "and only that");
        let _second = server.tunnel(pod(2), 5).expect("another pod's first");
        assert_eq!(server.tunnel(pod(3), 5).err(), Some(Limit::Handshakes), "all of them together are bounded, too");
        drop((held, first));
        server.tunnel(stranger(9), 5).expect("room again");
    }

    #[test]
    fn the_limit_of_open_files_is_raised() {
        let now = raise_open_files(None).expect("known");
        assert!(now > 64);
        assert_eq!(raise_open_files(Some(now)).expect("known"), now);
    }
}
