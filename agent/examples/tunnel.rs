//! Where the CPU goes when bytes cross a tunnel over loopback: an application on each side, each proxy on its own thread.
//!
//! `cargo run --release --example tunnel [seconds] [streams]` prints bytes per second and each proxy's CPU time for bulk
//! traffic, for ping-pong on open streams, and for short connections.
#![expect(clippy::disallowed_methods, reason = "a measurement joins what it has started, or ends with it")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use culvert::{
    proxy::copy::{self, Counters, ResetOnClose},
    tunnel::{Config, Connect, Pool, PoolKey, server},
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore, ServerConfig, pki_types::PrivateKeyDer, server::WebPkiClientVerifier};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinSet, LocalSet},
};

const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u64>().expect("a number"));
    let seconds = Duration::from_secs(args.next().unwrap_or(3));
    let streams = args.next().unwrap_or(4) as usize;
    let (client, server) = tls();
    for bulk in [Work::Upload, Work::Download, Work::PingPong, Work::Short] {
        run(bulk, seconds, streams, client.clone(), server.clone());
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Work {
    Upload,
    Download,
    PingPong,
    Short,
}

fn run(work: Work, seconds: Duration, streams: usize, client: Arc<ClientConfig>, server: Arc<ServerConfig>) {
    let stop = Arc::new(AtomicBool::new(false));
    let app = StdListener::bind("127.0.0.1:0").expect("bind");
    let app_addr = app.local_addr().expect("address");
    let done = stop.clone();
    let app = thread::spawn(move || application(&app, work, &done));
    let (server_tx, server_rx) = mpsc::channel();
    let done = stop.clone();
    let server_cpu = thread::Builder::new()
        .name("srvproxy".into())
        .spawn(move || proxy(done, |stop| server_proxy(app_addr, server, server_tx, stop)))
        .expect("thread");
    let tunnel = server_rx.recv().expect("address");
    let (client_tx, client_rx) = mpsc::channel();
    let done = stop.clone();
    let client_cpu = thread::Builder::new()
        .name("cliproxy".into())
        .spawn(move || proxy(done, |stop| client_proxy(tunnel, client, client_tx, stop)))
        .expect("thread");
    let front = client_rx.recv().expect("address");
    let moved = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let loads: Vec<_> = (0..streams)
        .map(|_| {
            let (stop, moved) = (stop.clone(), moved.clone());
            thread::spawn(move || load(front, work, &stop, &moved))
        })
        .collect();
    thread::sleep(seconds);
    stop.store(true, Relaxed);
    let elapsed = start.elapsed().as_secs_f64();
    let moved_total = moved.load(Relaxed) as f64;
    for load in loads {
        let _ = load.join();
    }
    let (client_cpu, server_cpu) = (client_cpu.join().expect("client"), server_cpu.join().expect("server"));
    // Wakes the accept of the application.
    let _ = StdStream::connect(app_addr);
    let _ = app.join();
    match work {
        Work::Upload | Work::Download => {
            let gb = moved_total / 1e9;
            println!(
                "{work:?} x{streams}: {:.2} GB/s; CPU s/GB: client proxy {:.3}, server proxy {:.3}",
                gb / elapsed,
                client_cpu / gb,
                server_cpu / gb
            );
        }
        Work::PingPong | Work::Short => {
            println!(
                "{work:?} x{streams}: {:.0}/s; CPU us each: client proxy {:.1}, server proxy {:.1}",
                moved_total / elapsed,
                client_cpu * 1e6 / moved_total,
                server_cpu * 1e6 / moved_total
            );
        }
    }
}

fn load(front: SocketAddr, work: Work, stop: &AtomicBool, moved: &AtomicU64) {
    let mut buffer = vec![0u8; 128 << 10];
    let mut connected = StdStream::connect(front).expect("connect");
    connected.set_nodelay(true).expect("nodelay");
    while !stop.load(Relaxed) {
        match work {
            Work::Upload => {
                connected.write_all(&buffer).expect("write");
                moved.fetch_add(buffer.len() as u64, Relaxed);
            }
            Work::Download => {
                let n = connected.read(&mut buffer).expect("read");
                moved.fetch_add(n as u64, Relaxed);
            }
            Work::PingPong | Work::Short => {
                connected.write_all(&buffer[..64]).expect("write");
                connected.read_exact(&mut buffer[..64]).expect("read");
                moved.fetch_add(1, Relaxed);
                if work == Work::Short {
                    connected = StdStream::connect(front).expect("connect");
                }
            }
        }
    }
}

fn application(listener: &StdListener, work: Work, stop: &Arc<AtomicBool>) {
    loop {
        let (mut tcp, _) = listener.accept().expect("accept");
        if stop.load(Relaxed) {
            return;
        }
        let stop = stop.clone();
        thread::spawn(move || {
            tcp.set_nodelay(true).expect("nodelay");
            let mut buffer = vec![0u8; 128 << 10];
            while !stop.load(Relaxed) {
                let went = match work {
                    Work::Upload => tcp.read(&mut buffer),
                    Work::Download => tcp.write(&buffer),
                    Work::PingPong | Work::Short => tcp.read(&mut buffer).and_then(|n| tcp.write(&buffer[..n])),
                };
                if !matches!(went, Ok(1..)) {
                    return;
                }
            }
        });
    }
}

/// Runs `serve` on one thread until told to stop; gives the thread's CPU time in seconds.
fn proxy(stop: Arc<AtomicBool>, serve: impl AsyncFnOnce(Arc<AtomicBool>)) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(LocalSet::new().run_until(async {
        let stopped = async {
            while !stop.load(Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! { () = stopped => {}, () = serve(stop.clone()) => {} }
    }));
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

async fn server_proxy(
    app: SocketAddr,
    tls: Arc<ServerConfig>,
    ready: mpsc::Sender<SocketAddr>,
    _stop: Arc<AtomicBool>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    ready.send(listener.local_addr().expect("address")).expect("main waits");
    let mut connections = JoinSet::new();
    loop {
        let (tcp, _) = listener.accept().await.expect("accept");
        tcp.set_nodelay(true).expect("nodelay");
        let handler = move |incoming: server::Incoming| async move {
            let tcp = TcpStream::connect(app).await.expect("application");
            tcp.set_nodelay(true).expect("nodelay");
            if let Ok(stream) = incoming.accept(None) {
                copy::bidirectional(ResetOnClose::new(tcp), stream, &Counters::default()).await;
            }
        };
        let tls = tls.clone();
        connections.spawn_local(async move {
            let _ = server::serve(tcp, tls, Config::default(), std::future::pending(), handler).await;
        });
    }
}

async fn client_proxy(
    tunnel: SocketAddr,
    tls: Arc<ClientConfig>,
    ready: mpsc::Sender<SocketAddr>,
    _stop: Arc<AtomicBool>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    ready.send(listener.local_addr().expect("address")).expect("main waits");
    let pool = Rc::new(Pool::new(Config::default()));
    let mut connections = JoinSet::new();
    loop {
        let (tcp, _) = listener.accept().await.expect("accept");
        tcp.set_nodelay(true).expect("nodelay");
        let (pool, tls) = (pool.clone(), tls.clone());
        connections.spawn_local(async move {
            let key = PoolKey {
                source: CLIENT.parse().expect("identity"),
                source_ip: [127, 0, 0, 1].into(),
                destination: tunnel,
                expected: [SERVER.parse().expect("identity")].into(),
            };
            let connect = Connect { authority: tunnel.into(), forwarded: None, baggage: None, traceparent: None };
            let dial = || {
                let tls = tls.clone();
                async move {
                    let tcp = TcpStream::connect(tunnel).await?;
                    tcp.set_nodelay(true)?;
                    Ok((tcp, tls))
                }
            };
            let stream = pool.open(None, &key, &connect, dial).await.expect("tunnel");
            copy::bidirectional(ResetOnClose::new(tcp), stream, &Counters::default()).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

fn tls() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let ca_key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).expect("CA");
    let issuer = Issuer::new(params, ca_key);
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).expect("root");
    let roots = Arc::new(roots);
    let leaf = |uri: &str| {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            vec![SanType::URI(uri.try_into().expect("URI")), SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer).expect("leaf");
        (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).expect("key"))
    };
    let (chain, key) = leaf(CLIENT);
    let mut client = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain, key)
        .expect("client");
    client.alpn_protocols = vec![b"h2".to_vec()];
    client.resumption = rustls::client::Resumption::disabled();
    let (chain, key) = leaf(SERVER);
    let verifier = WebPkiClientVerifier::builder(roots).build().expect("verifier");
    let mut server = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .expect("server");
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.send_tls13_tickets = 0;
    (Arc::new(client), Arc::new(server))
}
