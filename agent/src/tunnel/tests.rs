//! Both ends against each other, and each against the `h2` crate as a peer of its own.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use rustls::{AlertDescription, ClientConfig, ProtocolVersion, RootCertStore, ServerConfig, crypto::aws_lc_rs};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::{JoinSet, spawn_local},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    Config, Connect, OpenError, Pool, PoolKey, REASON_HEADER, Stream, StreamError, code, headers,
    server::{Incoming, ServeError},
    testing::*,
};
use crate::{
    ca::testkit::{Lab, id, start_agent},
    identity::{Clock, certificates},
    proxy::copy::{self, Counters, ResetOnClose},
    telemetry::panics,
};

type H2Server = h2::server::Connection<tokio_rustls::server::TlsStream<TcpStream>, Bytes>;

/// A listener whose connections speak HTTP/2 by the h2 crate.
async fn h2_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let addr = listener.local_addr().expect("address");
    (listener, addr)
}

async fn h2_accept(listener: &TcpListener, tls: &Tls, builder: &h2::server::Builder) -> H2Server {
    let (tcp, _) = listener.accept().await.expect("accept");
    let tls = TlsAcceptor::from(tls.server.clone()).accept(tcp).await.expect("TLS");
    builder.handshake(tls).await.expect("HTTP/2")
}

type H2Client = h2::client::SendRequest<Bytes>;

/// A connection of the h2 crate to one of our servers.
async fn h2_client(addr: SocketAddr, tls: &Tls) -> (H2Client, JoinSet<Result<(), h2::Error>>) {
    let tcp = TcpStream::connect(addr).await.expect("connect");
    let name = rustls::pki_types::ServerName::IpAddress(addr.ip().into());
    let tls = TlsConnector::from(tls.client.clone()).connect(name, tcp).await.expect("TLS");
    let (send, connection) = h2::client::Builder::new().handshake::<_, Bytes>(tls).await.expect("HTTP/2");
    let mut driver = JoinSet::new();
    driver.spawn_local(connection);
    (send, driver)
}

async fn raw_client(addr: SocketAddr, tls: &Tls) -> tokio_rustls::client::TlsStream<TcpStream> {
    let tcp = TcpStream::connect(addr).await.expect("connect");
    let name = rustls::pki_types::ServerName::IpAddress(addr.ip().into());
    TlsConnector::from(tls.client.clone()).connect(name, tcp).await.expect("TLS")
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

async fn accepted(incoming: Incoming) -> Stream {
    incoming.accept(None).expect("client waits")
}

/// §14.2, as the h2 crate sees it.
#[test]
fn connect_request_is_that_of_the_table() {
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let server = async {
            let mut h2 = h2_accept(&listener, &tls, &h2::server::Builder::new()).await;
            let (request, mut answer) = h2.accept().await.expect("one").expect("request");
            let (head, _body) = request.into_parts();
            assert_eq!(head.method, Method::CONNECT);
            assert_eq!(head.uri.to_string(), "10.0.0.1:9080");
            assert_eq!((head.uri.scheme(), head.uri.path_and_query()), (None, None));
            let headers: Vec<_> =
                head.headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().expect("text"))).collect();
            assert_eq!(
                headers,
                [
                    "forwarded: for=\"10.0.1.7:40312\";host=productpage.default.svc",
                    "baggage: k8s.cluster.name=c",
                    "traceparent: 00-0000000000000000000000000000000a-000000000000000b-00",
                ]
            );
            let response =
                Response::builder().header("baggage", "service.name=productpage").body(()).expect("response");
            let _send = answer.send_response(response, false).expect("sent");
            let _ = timeout(Duration::from_secs(1), h2.accept()).await;
        };
        let client = async {
            let pool = Pool::new(Config::default());
            let request = Connect {
                forwarded: Some(headers::forwarded(
                    "10.0.1.7:40312".parse().expect("address"),
                    Some("productpage.default.svc"),
                )),
                baggage: Some(headers::baggage([("k8s.cluster.name", "c")])),
                traceparent: Some(headers::traceparent(10, 11)),
                ..connect()
            };
            let stream = pool.open(None, &key(addr), &request, || dial(addr, tls.client.clone())).await.expect("open");
            assert_eq!(stream.baggage(), Some("service.name=productpage"));
        };
        tokio::join!(server, client);
    });
}

/// The next frame: its type, its flags, its stream, its payload.
async fn next_frame(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> (u8, u8, u32, Vec<u8>) {
    let mut head = [0; 9];
    from.read_exact(&mut head).await.expect("a frame");
    let [a, b, c, kind, flags, stream @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    from.read_exact(&mut payload).await.expect("its payload");
    (kind, flags, u32::from_be_bytes(stream), payload)
}

/// SETTINGS, which must come first, and what the connection's window is made to be.
async fn announced(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> (BTreeMap<u16, u32>, u32) {
    let (kind, flags, stream, payload) = next_frame(from).await;
    assert_eq!((kind, flags, stream), (4, 0, 0), "SETTINGS come first");
    let (settings, rest) = payload.as_chunks::<6>();
    assert!(rest.is_empty());
    let settings = settings.iter().map(|[a, b, value @ ..]| (u16::from_be_bytes([*a, *b]), u32::from_be_bytes(*value)));
    let settings = settings.collect();
    let (kind, _, stream, payload) = next_frame(from).await;
    assert_eq!((kind, stream), (8, 0), "WINDOW_UPDATE of the connection");
    (settings, 65_535 + u32::from_be_bytes(payload.try_into().expect("four bytes")))
}

/// §14.3, as it stands on the wire. A stream's window of 4 MiB is grown into, and the connection's never binds.
#[test]
fn settings_are_those_of_the_table() {
    const PUSH: u16 = 2;
    const STREAMS: u16 = 3;
    const WINDOW: u16 = 4;
    const FRAME: u16 = 5;
    const HEADERS: u16 = 6;
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let mut client = raw_client(server.addr, &tls).await;
        client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.expect("write");
        let (settings, window) = announced(&mut client).await;
        assert_eq!(settings, [(STREAMS, 200), (WINDOW, 256 << 10), (FRAME, 1 << 20), (HEADERS, 64 << 10)].into());
        assert_eq!(window, (1 << 31) - 1);

        let (listener, addr) = h2_listener().await;
        let server = async {
            let (tcp, _) = listener.accept().await.expect("accept");
            let mut raw = TlsAcceptor::from(tls.server.clone()).accept(tcp).await.expect("TLS");
            let mut preface = [0; 24];
            raw.read_exact(&mut preface).await.expect("a preface");
            assert_eq!(preface, PREFACE);
            announced(&mut raw).await
        };
        let pool = Pool::new(Config::default());
        let (settings, window) = tokio::select! {
            announced = server => announced,
            stream = open(&pool, addr, &tls.client) => panic!("nobody has answered: {stream:?}"),
        };
        assert_eq!(settings, [(PUSH, 0), (WINDOW, 256 << 10), (FRAME, 1 << 20), (HEADERS, 16 << 10)].into());
        assert_eq!(window, (1 << 31) - 1);
    });
}

/// A provider with these suites alone.
fn suites(suites: &[rustls::SupportedCipherSuite]) -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::CryptoProvider { cipher_suites: suites.to_vec(), ..aws_lc_rs::default_provider() })
}

/// §14.1: TLS 1.3, and the two suites with AES: whoever has none of them hears an alert, whichever end it is. The
/// configurations are the agent's own.
#[test]
fn peers_of_another_tls_get_an_alert() {
    use aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
    local(async {
        let lab = Lab::new();
        let ca = lab.start_ca(lab.config()).await;
        let (identities, agent) = start_agent(lab.agent_config(ca.address), Clock::default(), &[id("default/web")]);
        let web = id("default/web");
        let client = identities.client_config(&web, std::slice::from_ref(&web)).await.expect("a certificate");
        let server = identities.server_config(&web).await.expect("a certificate");
        let mut roots = RootCertStore::empty();
        for root in certificates(lab.root().as_bytes()).expect("PEM") {
            roots.add(root).expect("a root");
        }
        let tls = Tls { client, server, roots: Arc::new(roots) };
        let ours = Server::start(&tls, Config::default(), echo).await;

        // The control.
        let met = raw_client(ours.addr, &tls).await;
        assert_eq!(met.get_ref().1.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        drop(met);
        until(|| ours.ends.borrow().len() == 1).await;

        let default = aws_lc_rs::default_provider().cipher_suites;
        let others = [
            (&rustls::version::TLS12, suites(&default), AlertDescription::ProtocolVersion),
            (&rustls::version::TLS13, suites(&[TLS13_CHACHA20_POLY1305_SHA256]), AlertDescription::HandshakeFailure),
        ];
        for (version, provider, alert) in others {
            let about = format!("{version:?} {:?}", provider.cipher_suites);
            // As a client of our server …
            let mut config = ClientConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[version])
                .expect("a version")
                .with_root_certificates(tls.roots.clone())
                .with_client_cert_resolver(tls.client.client_auth_cert_resolver.clone());
            config.alpn_protocols = vec![b"h2".to_vec()];
            let tcp = TcpStream::connect(ours.addr).await.expect("connect");
            let name = rustls::pki_types::ServerName::IpAddress(ours.addr.ip().into());
            let ended = ours.ends.borrow().len();
            let error = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect_err(&about);
            let heard = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            assert_eq!(heard, Some(&rustls::Error::AlertReceived(alert)), "{about}: {error}");
            until(|| ours.ends.borrow().len() > ended).await;
            assert!(matches!(ours.ends.borrow()[ended], Err(ServeError::Tls(_))), "{about}: {:?}", ours.ends);

            // … and as a server of our client.
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_protocol_versions(&[version])
                .expect("a version")
                .with_no_client_auth()
                .with_cert_resolver(tls.server.cert_resolver.clone());
            config.alpn_protocols = vec![b"h2".to_vec()];
            let (listener, addr) = h2_listener().await;
            let theirs = async {
                let (tcp, _) = listener.accept().await.expect("accept");
                TlsAcceptor::from(Arc::new(config)).accept(tcp).await.map(drop)
            };
            let pool = Pool::new(Config::default());
            let (theirs, opened) = tokio::join!(theirs, open(&pool, addr, &tls.client));
            assert!(theirs.is_err(), "{about}");
            assert!(matches!(opened, Err(OpenError::Tls(_))), "{about}: {opened:?}");
        }
        agent.stop().await;
        ca.stop().await;
    });
}

/// What a client sends in bulk travels in records that are as long as TLS allows (RFC 8446 §5.1), read off the wire.
#[test]
fn bulk_travels_in_full_records() {
    const TOTAL: usize = 4 << 20;
    /// Content, its type, and the tag of the AEAD.
    const FULL: usize = (16 << 10) + 17;
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            let mut stream = accepted(incoming).await;
            let mut got = 0;
            while let Some(bytes) = stream.read().await.expect("read") {
                got += bytes.len();
            }
            assert_eq!(got, TOTAL);
            stream.write(b"whole").await.expect("write");
            stream.shutdown().expect("shutdown");
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        // Between the two, who writes down what the client sends.
        let (listener, wire) = h2_listener().await;
        let written = Rc::new(RefCell::new(Vec::new()));
        let mut between = JoinSet::new();
        let (record, to) = (written.clone(), server.addr);
        between.spawn_local(async move {
            let (client, _) = listener.accept().await.expect("accept");
            let server = TcpStream::connect(to).await.expect("connect");
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            let there = async {
                let mut buffer = vec![0; 256 << 10];
                while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
                    record.borrow_mut().extend_from_slice(&buffer[..n]);
                    to_server.write_all(&buffer[..n]).await.expect("the server reads");
                }
            };
            tokio::join!(there, tokio::io::copy(&mut from_server, &mut to_client)).1.expect("the client reads");
        });
        let pool = Pool::new(Config::default());
        let mut stream = open(&pool, wire, &tls.client).await.expect("open");
        stream.write(&vec![7; TOTAL]).await.expect("write");
        stream.shutdown().expect("shutdown");
        assert_eq!(stream.read().await.expect("read").as_deref(), Some(&b"whole"[..]));

        let written = written.borrow();
        let (mut rest, mut full, mut all) = (&written[..], 0, 0);
        while let [kind, 3, _, high, low, after @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            assert!(length <= FULL || *kind != 23, "a record of {length} bytes");
            full += usize::from(*kind == 23 && length == FULL);
            all += 1;
            rest = after.get(length..).expect("whole records");
        }
        assert!(rest.is_empty(), "no record starts with {:?}", &rest[..rest.len().min(5)]);
        let of = TOTAL / (16 << 10);
        println!("{full} full records of {all}, at least {of} needed");
        assert!(full >= of * 9 / 10, "{full} of {all} records are full; {of} would carry everything");
    });
}

/// §14.2: END_STREAM is half-close per direction; the other direction goes on.
#[test]
fn each_direction_ends_by_itself() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            assert_eq!(incoming.authority().to_string(), "10.0.0.1:9080");
            assert_eq!(incoming.peer().certificates.len(), 1);
            let mut stream = accepted(incoming).await;
            let mut got = Vec::new();
            while let Some(bytes) = stream.read().await.expect("read") {
                got.extend(bytes);
            }
            assert_eq!(got, b"request");
            // The client's direction has ended; ours has not.
            sleep(Duration::from_millis(20)).await;
            stream.write(b"answer").await.expect("write");
            stream.shutdown().expect("shutdown");
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
        stream.write(b"request").await.expect("write");
        stream.shutdown().expect("shutdown");
        assert_eq!(stream.read().await.expect("read").as_deref(), Some(&b"answer"[..]));
        assert_eq!(stream.read().await, Ok(None));
        assert_eq!(stream.read().await, Ok(None));
        assert!(stream.write(b"late").await.is_err());
    });
}

#[test]
fn the_server_may_speak_and_end_first() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            let mut stream = accepted(incoming).await;
            stream.write(b"220 hello").await.expect("write");
            stream.shutdown().expect("shutdown");
            assert_eq!(stream.read().await.expect("read").as_deref(), Some(&b"QUIT"[..]));
            assert_eq!(stream.read().await, Ok(None));
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
        assert_eq!(stream.read().await.expect("read").as_deref(), Some(&b"220 hello"[..]));
        assert_eq!(stream.read().await, Ok(None));
        stream.write(b"QUIT").await.expect("write");
        stream.shutdown().expect("shutdown");
        sleep(Duration::from_millis(50)).await;
        assert!(server.ends.borrow().is_empty(), "the connection stays");
    });
}

/// What [`connect`] asks for, at another port.
fn connect_to(port: u16) -> Connect {
    Connect { authority: format!("10.0.0.1:{port}").parse().expect("authority"), ..connect() }
}

async fn echoes(stream: &mut Stream, text: &'static [u8]) {
    stream.write(text).await.expect("write");
    assert_eq!(stream.read().await.expect("read").as_deref(), Some(text));
}

/// A panic about one connection ends that connection, and neither its tunnel nor what else is in it.
#[test]
fn a_panic_in_one_stream_harms_no_other_of_its_tunnel() {
    panics::install();
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            match incoming.authority().port {
                1 => panic!("before the answer"),
                2 => {
                    let mut stream = accepted(incoming).await;
                    assert_eq!(stream.read().await.expect("read"), None, "asked to panic while it is carried");
                }
                _ => echo(incoming).await,
            }
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let to = async |port| {
            pool.open(None, &key(server.addr), &connect_to(port), || dial(server.addr, tls.client.clone())).await
        };
        let mut other = to(9080).await.expect("open");
        echoes(&mut other, b"before").await;
        let before = panics::count();
        let refused = to(1).await.expect_err("its task has panicked");
        assert!(matches!(refused, OpenError::Reset(_)), "{refused}");
        let mut carried = to(2).await.expect("open");
        carried.write(b"something").await.expect("write");
        assert!(carried.read().await.is_err(), "the connection whose task panicked has ended");
        echoes(&mut other, b"after").await;
        echoes(&mut to(9080).await.expect("the next CONNECT"), b"next").await;
        assert_eq!((pool.connections(), server.accepted.get()), (1, 1), "all of it in one tunnel");
        // Other tests of this process may panic at the same time.
        assert!(panics::count() >= before + 2, "{} and {before}", panics::count());
    });
}

/// A dial that panics fails whoever waits for it, and not whoever comes after.
#[test]
fn a_panic_in_a_dial_is_not_the_end_of_the_pool() {
    panics::install();
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let before = panics::count();
        let dialled = Cell::new(0);
        let open = async || {
            let panics = || {
                dialled.set(dialled.get() + 1);
                let (first, dial) = (dialled.get() == 1, dial(server.addr, tls.client.clone()));
                async move {
                    assert!(!first, "the first dial");
                    dial.await
                }
            };
            pool.open(None, &key(server.addr), &connect(), panics).await
        };
        let (one, two) = tokio::join!(open(), open());
        for failed in [one, two] {
            let error = failed.expect_err("its dial has panicked");
            assert!(matches!(error, OpenError::Lost(_)), "{error}");
        }
        echoes(&mut open().await.expect("another dial"), b"hello").await;
        assert!(panics::count() > before);
    });
}

/// A socket, the client's proxy, the tunnel, the server's proxy, a socket.
struct Path {
    server: Server,
    front: SocketAddr,
    outcomes: Rc<RefCell<Vec<(copy::CopyOutcome, u64, u64)>>>,
    _tasks: JoinSet<()>,
}

impl Path {
    async fn to(app: SocketAddr) -> Self {
        let tls = tls();
        let handler = move |incoming: Incoming| async move {
            let tcp = TcpStream::connect(app).await.expect("app");
            let stream = accepted(incoming).await;
            copy::bidirectional(ResetOnClose::new(tcp), stream, &Counters::default()).await;
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let front = listener.local_addr().expect("address");
        let mut tasks = JoinSet::new();
        let outcomes: Rc<RefCell<Vec<_>>> = Rc::default();
        let (opener, addr, done) = (Rc::new(Pool::new(Config::default())), server.addr, outcomes.clone());
        tasks.spawn_local(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.expect("accept");
                let (opener, client, done) = (opener.clone(), tls.client.clone(), done.clone());
                connections.spawn_local(async move {
                    let stream = open(&opener, addr, &client).await.expect("open");
                    let counters = Counters::default();
                    let outcome = copy::bidirectional(ResetOnClose::new(tcp), stream, &counters).await;
                    done.borrow_mut().push((outcome, counters.forward.into_inner(), counters.backward.into_inner()));
                });
            }
        });
        Self { server, front, outcomes, _tasks: tasks }
    }

    async fn outcome(&self) -> (copy::CopyOutcome, u64, u64) {
        loop {
            if let Some(outcome) = self.outcomes.borrow_mut().pop() {
                return outcome;
            }
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Bytes whose place can be told from their value, so that a loss or a swap changes the sum.
fn pattern(offset: usize, buffer: &mut [u8]) {
    for (i, byte) in buffer.iter_mut().enumerate() {
        let at = offset + i;
        *byte = (at ^ (at >> 8) ^ (at >> 16)) as u8;
    }
}

async fn send_pattern(socket: &mut (impl tokio::io::AsyncWrite + Unpin), total: usize) {
    let mut buffer = vec![0; 100_003];
    let mut sent = 0;
    while sent < total {
        let n = buffer.len().min(total - sent);
        pattern(sent, &mut buffer[..n]);
        socket.write_all(&buffer[..n]).await.expect("write");
        sent += n;
    }
    socket.shutdown().await.expect("shutdown");
}

async fn check_pattern(socket: &mut (impl tokio::io::AsyncRead + Unpin), total: usize) {
    let (mut buffer, mut expected) = (vec![0; 70_001], vec![0; 70_001]);
    let mut got = 0;
    loop {
        let n = socket.read(&mut buffer).await.expect("read");
        if n == 0 {
            break;
        }
        pattern(got, &mut expected[..n]);
        assert!(buffer[..n] == expected[..n], "bytes differ near {got}");
        got += n;
    }
    assert_eq!(got, total);
}

#[test]
fn many_bytes_cross_both_ways_unchanged() {
    const TOTAL: usize = 64 << 20;
    local(async {
        let app = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let path = Path::to(app.local_addr().expect("address")).await;
        let far = async {
            let (mut tcp, _) = app.accept().await.expect("accept");
            let (mut read, mut write) = tcp.split();
            tokio::join!(check_pattern(&mut read, TOTAL), send_pattern(&mut write, TOTAL));
        };
        let near = async {
            let mut tcp = TcpStream::connect(path.front).await.expect("connect");
            let (mut read, mut write) = tcp.split();
            tokio::join!(check_pattern(&mut read, TOTAL), send_pattern(&mut write, TOTAL));
        };
        tokio::join!(far, near);
        let (outcome, forward, backward) = path.outcome().await;
        assert!(matches!(outcome, copy::CopyOutcome::Finished), "{outcome:?}");
        assert_eq!((forward, backward), (TOTAL as u64, TOTAL as u64));
    });
}

fn linger_zero(tcp: TcpStream) {
    socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO)).expect("linger");
}

/// A truncated transfer must not look like a finished one.
#[test]
fn a_reset_crosses_the_tunnel_as_a_reset() {
    local(async {
        let app = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let path = Path::to(app.local_addr().expect("address")).await;
        for server_resets in [true, false] {
            let mut near = TcpStream::connect(path.front).await.expect("connect");
            let (mut far, _) = app.accept().await.expect("accept");
            near.write_all(b"ping").await.expect("write");
            let mut buffer = [0; 4];
            far.read_exact(&mut buffer).await.expect("read");
            far.write_all(b"pong").await.expect("write");
            near.read_exact(&mut buffer).await.expect("read");
            let mut survivor = if server_resets {
                linger_zero(far);
                near
            } else {
                linger_zero(near);
                far
            };
            let error = survivor.read(&mut buffer).await.expect_err("reset, not EOF");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            let expected = if server_resets { copy::Side::Far } else { copy::Side::Near };
            let (outcome, ..) = path.outcome().await;
            let copy::CopyOutcome::Cut { side, cause } = outcome else { panic!("{outcome:?}") };
            assert_eq!(side, expected);
            assert!(matches!(cause, copy::Cause::Reset), "{cause:?}");
        }
        assert_eq!(path.server.accepted.get(), 1, "one tunnel carried both");
    });
}

#[test]
fn a_lost_tunnel_resets_its_sockets() {
    local(async {
        let app = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let path = Path::to(app.local_addr().expect("address")).await;
        let mut near = TcpStream::connect(path.front).await.expect("connect");
        let (mut far, _) = app.accept().await.expect("accept");
        far.write_all(b"x").await.expect("write");
        near.read_exact(&mut [0]).await.expect("read");
        // Past its deadline, the server cuts its streams off.
        path.server.drain(Instant::now());
        let error = near.read(&mut [0]).await.expect_err("reset, not EOF");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        let error = far.read(&mut [0]).await.expect_err("reset, not EOF");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn half_close_crosses_from_socket_to_socket() {
    local(async {
        let app = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let path = Path::to(app.local_addr().expect("address")).await;
        let mut near = TcpStream::connect(path.front).await.expect("connect");
        let (mut far, _) = app.accept().await.expect("accept");
        near.write_all(b"question").await.expect("write");
        near.shutdown().await.expect("shutdown");
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.expect("read");
        assert_eq!(got, b"question");
        far.write_all(b"answer").await.expect("write");
        drop(far);
        got.clear();
        near.read_to_end(&mut got).await.expect("read");
        assert_eq!(got, b"answer");
        assert!(matches!(path.outcome().await, (copy::CopyOutcome::Finished, 8, 6)));
    });
}

/// A dropped copy (a policy change, a shutdown) must not look like a finished transfer.
#[test]
fn a_dropped_copy_resets_both_sides() {
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        let (a, b) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (c, d) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (mut a, mut d) = (a.expect("connect"), d.expect("accept").0);
        let (counters, charge) = (Counters::default(), charge());
        let copied = copy::bidirectional_plain(
            ResetOnClose::new(b.expect("accept").0),
            ResetOnClose::new(c.expect("connect")),
            &counters,
            &charge,
        );
        assert!(timeout(Duration::from_millis(20), copied).await.is_err());
        for socket in [&mut a, &mut d] {
            let error = socket.read(&mut [0]).await.expect_err("reset, not EOF");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn a_plain_copy_passes_bytes_and_half_close() {
    const TOTAL: usize = 3 << 20;
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        let (a, b) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (c, d) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (mut a, mut d) = (a.expect("connect"), d.expect("accept").0);
        let (counters, charge) = (Counters::default(), charge());
        let copied = copy::bidirectional_plain(
            ResetOnClose::new(b.expect("accept").0),
            ResetOnClose::new(c.expect("connect")),
            &counters,
            &charge,
        );
        let ends = async {
            send_pattern(&mut a, TOTAL).await;
            check_pattern(&mut a, TOTAL / 2).await;
        };
        let far = async {
            check_pattern(&mut d, TOTAL).await;
            send_pattern(&mut d, TOTAL / 2).await;
        };
        let (outcome, ..) = tokio::join!(copied, ends, far);
        assert!(matches!(outcome, copy::CopyOutcome::Finished), "{outcome:?}");
        assert_eq!(counters.forward.into_inner(), TOTAL as u64);
        assert_eq!(counters.backward.into_inner(), TOTAL as u64 / 2);
    });
}

/// [H.3]: concurrent first requests wait for one connection; another key gets another.
#[test]
fn concurrent_first_requests_share_one_dial() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let streams = futures_util::future::join_all((0..50).map(|_| open(&pool, server.addr, &tls.client))).await;
        assert!(streams.iter().all(Result::is_ok));
        assert_eq!(server.accepted.get(), 1);
        let addr = server.addr;
        let others = [
            PoolKey { source_ip: [127, 0, 0, 2].into(), ..key(addr) },
            PoolKey { source: SERVER.parse().expect("identity"), ..key(addr) },
            PoolKey { expected: [CLIENT.parse().expect("identity")].into(), ..key(addr) },
        ];
        for (i, other) in others.iter().enumerate() {
            let _stream = pool.open(None, other, &connect(), || dial(addr, tls.client.clone())).await.expect("open");
            assert_eq!(server.accepted.get(), 2 + i, "{other:?}");
        }
    });
}

#[test]
fn a_failed_dial_fails_its_waiters_and_the_next_request_dials_again() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let dials = Cell::new(0);
        let failing = || {
            dials.set(dials.get() + 1);
            async {
                sleep(Duration::from_millis(20)).await;
                anyhow::bail!("no route")
            }
        };
        let (key, request) = (key(server.addr), connect());
        let results = futures_util::future::join_all((0..5).map(|_| pool.open(None, &key, &request, failing))).await;
        assert!(results.iter().all(|r| matches!(r, Err(OpenError::Connect(_)))), "{results:?}");
        assert_eq!(dials.get(), 1);
        open(&pool, server.addr, &tls.client).await.expect("the next dials again");
    });
}

#[test]
fn a_caller_who_goes_away_does_not_take_the_dial_along() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let slow = || {
            let (addr, client) = (server.addr, tls.client.clone());
            async move {
                sleep(Duration::from_millis(500)).await;
                dial(addr, client).await
            }
        };
        let (key, request) = (key(server.addr), connect());
        let never = || async { anyhow::bail!("the second must wait for the first's dial") };
        let first = timeout(Duration::from_millis(10), pool.open(None, &key, &request, slow));
        let second = async {
            tokio::task::yield_now().await;
            pool.open(None, &key, &request, never).await
        };
        let (first, second) = tokio::join!(first, second);
        assert!(first.is_err());
        second.expect("open");
        assert_eq!(server.accepted.get(), 1);
    });
}

/// §14.3: at most 100 streams, and no more than the peer takes, then another connection.
#[test]
fn a_full_connection_is_followed_by_another() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let mut streams = Vec::new();
        for i in 1..=101 {
            streams.push(open(&pool, server.addr, &tls.client).await.expect("open"));
            assert_eq!(server.accepted.get(), if i <= 100 { 1 } else { 2 });
        }
        drop(streams.remove(0));
        streams.push(open(&pool, server.addr, &tls.client).await.expect("open"));
        assert_eq!(server.accepted.get(), 2, "the room of a dropped stream is used again");
    });
}

/// Answers 200 to everything on every connection, by the h2 crate.
fn h2_accept_all(listener: TcpListener, tls: Tls, builder: h2::server::Builder) -> (JoinSet<()>, Rc<Cell<usize>>) {
    let mut tasks = JoinSet::new();
    let count = Rc::new(Cell::new(0));
    let accepted = count.clone();
    tasks.spawn_local(async move {
        let mut connections = JoinSet::new();
        loop {
            let mut h2 = h2_accept(&listener, &tls, &builder).await;
            accepted.set(accepted.get() + 1);
            connections.spawn_local(async move {
                let mut open = Vec::new();
                while let Some(Ok((request, mut answer))) = h2.accept().await {
                    open.push((answer.send_response(Response::new(()), false).expect("answer"), request));
                }
            });
        }
    });
    (tasks, count)
}

#[test]
fn the_peers_limit_of_streams_is_kept() {
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let mut builder = h2::server::Builder::new();
        builder.max_concurrent_streams(3);
        let (_tasks, accepted) = h2_accept_all(listener, tls.clone(), builder);
        let pool = Pool::new(Config::default());
        let streams = futures_util::future::join_all((0..7).map(|_| open(&pool, addr, &tls.client))).await;
        assert!(streams.iter().all(Result::is_ok), "{streams:?}");
        assert_eq!(accepted.get(), 3);
    });
}

/// [H.4]: after GOAWAY open streams go on, new ones go elsewhere, and the deadline cuts off.
#[test]
fn goaway_lets_streams_finish_and_moves_new_ones() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let mut old = open(&pool, server.addr, &tls.client).await.expect("open");
        let mut stuck = open(&pool, server.addr, &tls.client).await.expect("open");
        server.drain(Instant::now() + Duration::from_secs(3));
        sleep(Duration::from_millis(500)).await;
        server.undrain();
        let _new = open(&pool, server.addr, &tls.client).await.expect("open");
        assert_eq!(server.accepted.get(), 2);
        old.write(b"still here").await.expect("write");
        old.shutdown().expect("shutdown");
        assert_eq!(old.read().await.expect("read").as_deref(), Some(&b"still here"[..]));
        assert_eq!(old.read().await, Ok(None));
        assert!(server.ends.borrow().is_empty());
        assert!(stuck.read().await.is_err(), "cut off at the deadline");
        until(|| !server.ends.borrow().is_empty()).await;
        assert!(matches!(server.ends.borrow()[..], [Ok(())]), "{:?}", server.ends.borrow());
    });
}

#[test]
fn a_drained_server_ends_as_soon_as_its_streams_have() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
        server.drain(Instant::now() + Duration::from_secs(3600));
        sleep(Duration::from_millis(50)).await;
        assert!(server.ends.borrow().is_empty());
        stream.shutdown().expect("shutdown");
        assert_eq!(stream.read().await, Ok(None));
        drop(stream);
        until(|| !server.ends.borrow().is_empty()).await;
        assert!(matches!(server.ends.borrow()[..], [Ok(())]), "{:?}", server.ends.borrow());
    });
}

/// A stream refused before processing is tried once more on a fresh connection, and only once.
#[test]
fn a_refused_stream_is_retried_once_elsewhere() {
    for second_refuses in [false, true] {
        local(async {
            let tls = tls();
            let (listener, addr) = h2_listener().await;
            let pool = Pool::new(Config::default());
            let seen = Cell::new(0);
            let server = async {
                let mut connections = Vec::new();
                for refuse in [true, second_refuses] {
                    let mut h2 = h2_accept(&listener, &tls, &h2::server::Builder::new()).await;
                    let (request, mut answer) = h2.accept().await.expect("one").expect("request");
                    seen.set(seen.get() + 1);
                    if refuse {
                        answer.send_reset(h2::Reason::REFUSED_STREAM);
                    } else {
                        connections.push((answer.send_response(Response::new(()), false).expect("answer"), request));
                    }
                    drop(answer);
                    spawn_local(async move { while h2.accept().await.is_some() {} });
                }
                std::future::pending::<()>().await
            };
            let client = open(&pool, addr, &tls.client);
            let result = tokio::select! { () = server => unreachable!(), result = client => result };
            assert_eq!(seen.get(), 2);
            match result {
                Ok(_) => assert!(!second_refuses),
                Err(error) => {
                    assert!(second_refuses && matches!(error, OpenError::Reset(code::REFUSED_STREAM)), "{error:?}");
                }
            }
        });
    }
}

/// Time-outs short enough to wait for, and long enough for a machine that is busy with other things.
fn fast() -> Config {
    Config {
        connect_timeout: Duration::from_millis(500),
        handshake_timeout: Duration::from_secs(1),
        ping_interval: Duration::from_millis(100),
        ping_timeout: Duration::from_millis(1500),
        idle_timeout: Duration::from_secs(2),
        ..Config::default()
    }
}

/// §14.3: PING every 10 s, dead after 20 s without an answer.
#[test]
fn a_silent_peer_is_dead_after_its_ping_timeout() {
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let pool = Pool::new(Config::default());
        let mut h2 = None;
        let mut open_streams = Vec::new();
        let serve = async {
            let h2 = h2.insert(h2_accept(&listener, &tls, &h2::server::Builder::new()).await);
            while let Some(Ok((request, mut answer))) = h2.accept().await {
                open_streams.push((answer.send_response(Response::new(()), false).expect("answer"), request));
            }
        };
        let client = open(&pool, addr, &tls.client);
        let mut stream = tokio::select! { () = serve => unreachable!(), stream = client => stream.expect("open") };
        // From here on nobody polls the server: as if its process had stopped, with its sockets open.
        tokio::time::pause();
        let start = Instant::now();
        let error = stream.read().await.expect_err("dead");
        assert!(matches!(error, StreamError::Lost(_)), "{error:?}");
        let after = start.elapsed();
        assert!(after >= Duration::from_secs(29) && after <= Duration::from_secs(31), "{after:?}");
        assert_eq!(pool.connections(), 0);
    });
}

#[test]
fn the_server_notices_a_silent_client() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, fast(), echo).await;
        let mut client = raw_client(server.addr, &tls).await;
        client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.expect("write");
        let start = Instant::now();
        until(|| !server.ends.borrow().is_empty()).await;
        assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
        assert!(matches!(server.ends.borrow()[..], [Err(ServeError::Lost(_))]), "{:?}", server.ends.borrow());
    });
}

#[test]
fn answered_pings_keep_an_open_stream_alive() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, fast(), echo).await;
        let pool = Pool::new(fast());
        let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
        // Several times the ping's and the idle time-outs.
        sleep(Duration::from_millis(2500)).await;
        stream.write(b"alive").await.expect("write");
        assert_eq!(stream.read().await.expect("read").as_deref(), Some(&b"alive"[..]));
    });
}

/// §14.3: an unused pooled connection is dropped.
#[test]
fn an_idle_connection_is_dropped() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(fast());
        drop(open(&pool, server.addr, &tls.client).await.expect("open"));
        sleep(Duration::from_millis(1200)).await;
        drop(open(&pool, server.addr, &tls.client).await.expect("open"));
        sleep(Duration::from_millis(1200)).await;
        assert_eq!((pool.connections(), server.accepted.get()), (1, 1), "use starts the time anew");
        until(|| pool.connections() == 0).await;
        until(|| !server.ends.borrow().is_empty()).await;
        assert!(matches!(server.ends.borrow()[..], [Ok(())]), "{:?}", server.ends.borrow());
        open(&pool, server.addr, &tls.client).await.expect("a new one is dialled");
        assert_eq!(server.accepted.get(), 2);
    });
}

#[test]
fn a_connect_that_takes_too_long_is_told_apart() {
    local(async {
        let tls = tls();
        let pool = Pool::new(fast());
        let addr = "127.0.0.1:9".parse().expect("address");
        let silent = || std::future::pending();
        let error = pool.open(None, &key(addr), &connect(), silent).await.expect_err("no connection");
        assert!(matches!(error, OpenError::ConnectTimeout), "{error:?}");
        let kernel = || async { Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()) };
        let error = pool.open(None, &key(addr), &connect(), kernel).await.expect_err("no connection");
        assert!(matches!(error, OpenError::ConnectTimeout), "{error:?}");
        // A peer that accepts and says nothing.
        let (_listener, addr) = h2_listener().await;
        let error = open(&pool, addr, &tls.client).await.expect_err("no handshake");
        assert!(matches!(error, OpenError::HandshakeTimeout), "{error:?}");
    });
}

/// §14.1: a client certificate is always required; either side's refusal is typed and says why.
#[test]
fn tls_failures_say_why() {
    local(async {
        let (ours, theirs) = (tls(), tls());
        let server = Server::start(&ours, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let error = open(&pool, server.addr, &theirs.client).await.expect_err("unknown server");
        assert!(matches!(&error, OpenError::Tls(why) if why.contains("UnknownIssuer")), "{error:?}");
        let mut anonymous = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(ours.roots.clone())
            .with_no_client_auth();
        anonymous.alpn_protocols = vec![b"h2".to_vec()];
        let error = open(&pool, server.addr, &Arc::new(anonymous)).await.expect_err("no certificate");
        assert!(matches!(&error, OpenError::Tls(why) if why.contains("CertificateRequired")), "{error:?}");
        let mut no_alpn = ClientConfig::clone(&ours.client);
        no_alpn.alpn_protocols.clear();
        open(&pool, server.addr, &Arc::new(no_alpn)).await.expect_err("no ALPN");
        until(|| server.ends.borrow().len() == 3).await;
        let ends = server.ends.borrow();
        assert!(ends.len() == 3 && ends.iter().all(|e| matches!(e, Err(ServeError::Tls(_)))), "{ends:?}");
    });
}

#[test]
fn a_refusal_carries_status_and_reason() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            incoming.refuse(401, Some("strict-requires-mtls")).expect("client waits");
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        for _ in 0..2 {
            let error = open(&pool, server.addr, &tls.client).await.expect_err("refused");
            let OpenError::Refused { status: 401, reason: Some(reason) } = error else { panic!("{error:?}") };
            assert_eq!(reason, "strict-requires-mtls");
        }
        assert_eq!(server.accepted.get(), 1);
    });
}

/// §14.2: what is not a CONNECT to `host:port` is answered with 400, and the connection goes on.
#[test]
fn malformed_requests_are_answered_with_400() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let (send, _driver) = h2_client(server.addr, &tls).await;
        for (method, uri, status) in [
            (Method::GET, "https://10.0.0.1:80/", 400),
            (Method::CONNECT, "10.0.0.1", 400),
            (Method::CONNECT, "10.0.0.1:0", 400),
            (Method::CONNECT, "10.0.0.256:80", 400),
            (Method::CONNECT, "[fd00::1]:80", 200),
        ] {
            let request = http::Request::builder().method(method).uri(uri).body(()).expect("request");
            let (answer, _body) =
                send.clone().ready().await.expect("ready").send_request(request, false).expect("sent");
            let answer = answer.await.expect(uri);
            assert_eq!(answer.status(), StatusCode::from_u16(status).expect("status"), "{uri}");
            assert_eq!(answer.headers().contains_key(REASON_HEADER), status == 400);
        }
    });
}

#[test]
fn an_unanswered_request_is_reset_and_a_cancelled_one_is_noticed() {
    local(async {
        let tls = tls();
        let cancelled = Rc::new(Notify::new());
        let noticed = cancelled.clone();
        let first = Rc::new(Cell::new(true));
        let handler = move |mut incoming: Incoming| {
            let (noticed, first) = (noticed.clone(), first.clone());
            async move {
                if !first.replace(false) {
                    incoming.cancelled().await;
                    noticed.notify_one();
                }
            }
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let error = open(&pool, server.addr, &tls.client).await.expect_err("dropped");
        assert!(matches!(error, OpenError::Reset(_)), "{error:?}");
        let given_up = timeout(Duration::from_millis(50), open(&pool, server.addr, &tls.client)).await;
        assert!(given_up.is_err());
        cancelled.notified().await;
    });
}

/// 400 of 400 streams finish beside six readers that never read, in one pool key.
#[test]
fn readers_that_never_read_stall_nobody_else() {
    local(async {
        let tls = tls();
        // Sends 8 MiB, more than a stream's window, to who asks for nothing; echoes what others send.
        let handler = |incoming: Incoming| async move {
            let stalled = incoming.header("baggage") == Some("stalled");
            let mut stream = accepted(incoming).await;
            if stalled {
                while stream.write(&vec![0; 1 << 20]).await.is_ok() {}
                return;
            }
            while let Ok(Some(bytes)) = stream.read().await {
                let _ = stream.write(&bytes).await;
            }
            let _ = stream.shutdown();
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let request = Connect { baggage: Some("stalled".into()), ..connect() };
        let mut stalled = Vec::new();
        for _ in 0..6 {
            let opened = pool.open(None, &key(server.addr), &request, || dial(server.addr, tls.client.clone())).await;
            stalled.push(opened.expect("open"));
        }
        // Their windows fill up.
        sleep(Duration::from_millis(300)).await;
        let one = async || {
            let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
            for _ in 0..4 {
                stream.write(&vec![7; 16 << 10]).await.expect("write");
            }
            stream.shutdown().expect("shutdown");
            let mut got = 0;
            while let Some(bytes) = stream.read().await.expect("read") {
                got += bytes.len();
            }
            assert_eq!(got, 64 << 10);
        };
        futures_util::future::join_all((0..400).map(|_| one())).await;
        assert_eq!(stalled.len(), 6);
    });
}

/// The same in the other direction: six writers whose server does not read.
#[test]
fn a_server_that_does_not_read_holds_only_its_own_stream() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            if incoming.header("baggage") == Some("stalled") {
                let _stream = accepted(incoming).await;
                std::future::pending::<()>().await;
            } else {
                echo(incoming).await;
            }
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let request = Connect { baggage: Some("stalled".into()), ..connect() };
        let mut writers = JoinSet::new();
        for _ in 0..6 {
            let opened = pool.open(None, &key(server.addr), &request, || dial(server.addr, tls.client.clone())).await;
            let mut stream = opened.expect("open");
            writers.spawn_local(async move {
                let mut sent = 0;
                while timeout(Duration::from_secs(1), stream.write(&[0; 64 << 10])).await.is_ok() {
                    sent += 64 << 10;
                }
                (sent, stream)
            });
        }
        let mut held = Vec::new();
        while let Some(writer) = writers.join_next().await {
            let (sent, stream) = writer.expect("no panic");
            // A window that nobody reads stays at its first size.
            assert!((256 << 10..=320 << 10).contains(&sent), "{sent}");
            held.push(stream);
        }
        let stream = open(&pool, server.addr, &tls.client).await.expect("open");
        let (mut stream, mut writer) = stream.split();
        let mut write = JoinSet::new();
        write.spawn_local(async move {
            writer.write(&vec![7; 1 << 20]).await.expect("write");
            writer.shutdown().expect("shutdown");
        });
        let mut got = 0;
        while let Some(bytes) = stream.read().await.expect("read") {
            got += bytes.len();
        }
        assert_eq!((got, server.accepted.get()), (1 << 20, 1));
    });
}

/// Runs `attack` against a server whose handlers never end by themselves; gives how the connection ended.
async fn attacked(
    attack: impl AsyncFnOnce(tokio_rustls::client::TlsStream<TcpStream>),
) -> (usize, Result<(), ServeError>) {
    let tls = tls();
    let alive = Rc::new(Cell::new(0));
    let most = Rc::new(Cell::new(0));
    let (count, peak) = (alive.clone(), most.clone());
    let handler = move |incoming: Incoming| {
        let (count, peak) = (count.clone(), peak.clone());
        async move {
            count.set(count.get() + 1);
            peak.set(peak.get().max(count.get()));
            let _incoming = incoming;
            std::future::pending::<()>().await;
        }
    };
    let server = Server::start(&tls, Config::default(), handler).await;
    let client = raw_client(server.addr, &tls).await;
    attack(client).await;
    let drained = async {
        while server.ends.borrow().is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), drained).await.expect("the server ends the connection");
    let end = server.ends.borrow_mut().pop().expect("one");
    (most.get(), end)
}

/// `:method: CONNECT`, `:authority: a:1`, both literal without indexing.
const HEADERS: &[u8] = b"\x02\x07CONNECT\x01\x03a:1";

/// HTTP/2 rapid reset: streams opened and reset at once.
#[test]
fn rapid_reset_ends_the_connection() {
    local(async {
        let (most, end) = attacked(async |mut client| {
            let _ = client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await;
            for id in 0..1_000_000u32 {
                let id = 2 * id + 1;
                let pair = [frame(1, 4, id, HEADERS), frame(3, 0, id, &8u32.to_be_bytes())].concat();
                if client.write_all(&pair).await.is_err() {
                    return;
                }
            }
        })
        .await;
        assert!(matches!(end, Err(ServeError::Protocol(_))), "{end:?}");
        assert!(most <= 400, "{most} handlers at once");
    });
}

#[test]
fn a_continuation_flood_ends_the_connection() {
    local(async {
        let (most, end) = attacked(async |mut client| {
            let _ = client.write_all(&[PREFACE, &frame(4, 0, 0, &[]), &frame(1, 0, 1, HEADERS)].concat()).await;
            // One literal of 8 KiB in each.
            let mut payload = b"\x00\x01x\x7f\x81\x3f".to_vec();
            payload.extend(vec![b'a'; 8192]);
            for _ in 0..10_000 {
                if client.write_all(&frame(9, 0, 1, &payload)).await.is_err() {
                    return;
                }
            }
        })
        .await;
        assert!(matches!(end, Err(ServeError::Protocol(_))), "{end:?}");
        assert_eq!(most, 0);
    });
}

/// PING and SETTINGS ask for answers; a client that does not read them is held back by TCP.
#[test]
fn floods_of_control_frames_are_held_back() {
    for flood in [frame(6, 0, 0, &[1; 8]), frame(4, 0, 0, &[])] {
        local(async {
            let tls = tls();
            let server = Server::start(&tls, Config::default(), echo).await;
            let mut client = raw_client(server.addr, &tls).await;
            let _ = client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await;
            let chunk = flood.repeat(1000);
            let mut sent = 0usize;
            while let Ok(written) = timeout(Duration::from_millis(400), client.write_all(&chunk)).await {
                written.expect("write");
                sent += chunk.len();
                // More than the sockets' buffers hold: answers must be piling up in memory.
                assert!(sent < 64 << 20, "nobody stops the flood");
            }
            assert!(server.ends.borrow().is_empty());
        });
    }
}

#[test]
fn a_slow_preface_is_not_waited_for() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, fast(), echo).await;
        let _no_tls = TcpStream::connect(server.addr).await.expect("connect");
        let mut slow = raw_client(server.addr, &tls).await;
        slow.write_all(&PREFACE[..10]).await.expect("write");
        until(|| server.ends.borrow().len() == 2).await;
        let ends = server.ends.borrow();
        assert!(ends.len() == 2 && ends.iter().all(|e| matches!(e, Err(ServeError::HandshakeTimeout))), "{ends:?}");
    });
}

#[test]
fn a_drained_pool_finishes_its_streams_until_the_deadline() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let mut finishing = open(&pool, server.addr, &tls.client).await.expect("open");
        let mut stuck = open(&pool, server.addr, &tls.client).await.expect("open");
        let use_them = async {
            sleep(Duration::from_millis(50)).await;
            let refused = open(&pool, server.addr, &tls.client).await.expect_err("no new streams");
            assert!(matches!(refused, OpenError::Closed), "{refused:?}");
            finishing.write(b"last").await.expect("write");
            assert_eq!(finishing.read().await.expect("read").as_deref(), Some(&b"last"[..]));
            assert!(stuck.read().await.is_err());
        };
        let start = Instant::now();
        tokio::join!(pool.drain(start + Duration::from_secs(2)), use_them);
        assert!(start.elapsed() >= Duration::from_secs(2));
    });
}

/// The h2 crate as the other end, in bulk, with windows of its own: ours must keep to them, and rekey on the way.
#[test]
fn bulk_crosses_to_and_from_the_reference_server() {
    const TOTAL: usize = 6 << 20;
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let mut server = JoinSet::new();
        let server_tls = tls.clone();
        server.spawn_local(async move {
            // 64 KiB for the whole connection, which eight streams share.
            let mut h2 = h2_accept(&listener, &server_tls, &h2::server::Builder::new()).await;
            let mut streams = JoinSet::new();
            while let Some(Ok((request, mut answer))) = h2.accept().await {
                streams.spawn_local(async move {
                    let mut send = answer.send_response(Response::new(()), false).expect("answer");
                    let mut body = request.into_body();
                    while let Some(data) = body.data().await {
                        let mut data = data.expect("data");
                        body.flow_control().release_capacity(data.len()).expect("capacity");
                        while !data.is_empty() {
                            send.reserve_capacity(data.len());
                            let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await;
                            let room = room.expect("open").expect("room");
                            send.send_data(data.split_to(room.min(data.len())), false).expect("sent");
                        }
                    }
                    send.send_data(Bytes::new(), true).expect("sent");
                });
            }
        });
        let pool = Pool::new(Config::default());
        let one = async || {
            let (mut read, mut write) = open(&pool, addr, &tls.client).await.expect("open").split();
            let send = async {
                let mut buffer = vec![0; 50_001];
                let mut sent = 0;
                while sent < TOTAL / 8 {
                    let n = buffer.len().min(TOTAL / 8 - sent);
                    pattern(sent, &mut buffer[..n]);
                    write.write(&buffer[..n]).await.expect("write");
                    sent += n;
                }
                write.shutdown().expect("shutdown");
            };
            let check = async {
                let mut got = 0;
                while let Some(bytes) = read.read().await.expect("read") {
                    let mut expected = vec![0; bytes.len()];
                    pattern(got, &mut expected);
                    assert!(bytes == expected, "bytes differ near {got}");
                    got += bytes.len();
                }
                assert_eq!(got, TOTAL / 8);
            };
            tokio::join!(send, check);
        };
        futures_util::future::join_all((0..8).map(|_| one())).await;
    });
}

#[test]
fn bulk_crosses_to_and_from_the_reference_client() {
    const TOTAL: usize = 6 << 20;
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let (send, _driver) = h2_client(server.addr, &tls).await;
        let request = http::Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).expect("request");
        let (answer, mut body) = send.ready().await.expect("ready").send_request(request, false).expect("sent");
        let mut answer = answer.await.expect("answer").into_body();
        let send = async {
            let mut sent = 0;
            while sent < TOTAL {
                body.reserve_capacity(40_000.min(TOTAL - sent));
                let room = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.expect("open").expect("room");
                let mut data = vec![0; room.min(TOTAL - sent)];
                pattern(sent, &mut data);
                sent += data.len();
                body.send_data(data.into(), false).expect("sent");
            }
            body.send_data(Bytes::new(), true).expect("sent");
        };
        let check = async {
            let mut got = 0;
            while let Some(bytes) = answer.data().await {
                let bytes = bytes.expect("data");
                answer.flow_control().release_capacity(bytes.len()).expect("capacity");
                let mut expected = vec![0; bytes.len()];
                pattern(got, &mut expected);
                assert!(bytes == expected, "bytes differ near {got}");
                got += bytes.len();
            }
            assert_eq!(got, TOTAL);
        };
        tokio::join!(send, check);
    });
}

/// Windows start small and grow to their limit while somebody reads.
#[test]
fn a_window_grows_with_use_and_is_then_what_a_stalled_reader_holds() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            let mut stream = accepted(incoming).await;
            let mut got = 0;
            while got < 32 << 20 {
                got += stream.read().await.expect("read").expect("more").len();
            }
            std::future::pending::<()>().await;
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
        let block = vec![0; 64 << 10];
        for _ in 0..512 {
            stream.write(&block).await.expect("write");
        }
        let mut more = 0;
        while timeout(Duration::from_secs(1), stream.write(&block)).await.is_ok() {
            more += block.len();
        }
        assert!((2 << 20..=4 << 20).contains(&more), "{more}");
    });
}

/// RFC 8446 §4.6.3: the peer may change its keys, and ask for ours to change.
#[test]
fn key_updates_of_the_peer_are_followed() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let mut client = raw_client(server.addr, &tls).await;
        let connect = frame(1, 4, 1, HEADERS);
        client.write_all(&[PREFACE, &frame(4, 0, 0, &[]), &connect].concat()).await.expect("write");
        for round in 0..20u8 {
            client.get_mut().1.refresh_traffic_keys().expect("TLS 1.3");
            client.write_all(&frame(0, 0, 1, &[round; 100])).await.expect("write");
            // Our echo of it, wherever it starts among other frames.
            let mut got = Vec::new();
            while !got.windows(100).any(|window| window == [round; 100]) {
                let mut buffer = [0; 4096];
                let n = client.read(&mut buffer).await.expect("read");
                assert_ne!(n, 0, "closed in round {round}");
                got.extend_from_slice(&buffer[..n]);
            }
        }
    });
}

/// What follows the last byte of an answer does not spoil it: RST_STREAM with NO_ERROR after END_STREAM only says that
/// the peer wants no more (RFC 9113 §8.1).
#[test]
fn an_answer_is_delivered_although_the_peer_wants_no_more() {
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let mut tasks = JoinSet::new();
        let server_tls = tls.clone();
        tasks.spawn_local(async move {
            let mut h2 = h2_accept(&listener, &server_tls, &h2::server::Builder::new()).await;
            let (request, mut answer) = h2.accept().await.expect("one").expect("request");
            let mut send = answer.send_response(Response::new(()), false).expect("answer");
            send.send_data(Bytes::from_static(b"whole"), true).expect("sent");
            // Let the frames go before the request's body is dropped, which resets with NO_ERROR or CANCEL.
            let _ = timeout(Duration::from_millis(50), h2.accept()).await;
            answer.send_reset(h2::Reason::NO_ERROR);
            let _request = request;
            while h2.accept().await.is_some() {}
        });
        let front = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let (app, near) = tokio::join!(TcpStream::connect(front.local_addr().expect("address")), front.accept());
        let (mut app, near) = (app.expect("connect"), near.expect("accept").0);
        let pool = Pool::new(Config::default());
        let stream = open(&pool, addr, &tls.client).await.expect("open");
        let counters = Counters::default();
        let reader = async {
            sleep(Duration::from_millis(100)).await;
            let mut got = Vec::new();
            app.read_to_end(&mut got).await.expect("EOF, not a reset");
            assert_eq!(got, b"whole");
        };
        let (outcome, ()) = tokio::join!(copy::bidirectional(ResetOnClose::new(near), stream, &counters), reader);
        assert!(matches!(outcome, copy::CopyOutcome::Finished), "{outcome:?}");
    });
}

/// A request above the last id of a GOAWAY was not processed, and goes to a fresh connection.
#[test]
fn a_request_above_the_last_id_is_retried() {
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let first = async {
            let (tcp, _) = listener.accept().await.expect("accept");
            let mut raw = TlsAcceptor::from(tls.server.clone()).accept(tcp).await.expect("TLS");
            raw.read_exact(&mut [0; 100]).await.expect("preface, SETTINGS, WINDOW_UPDATE, part of HEADERS");
            let goaway = frame(7, 0, 0, &[0; 8]);
            raw.write_all(&[frame(4, 0, 0, &[]), goaway].concat()).await.expect("write");
            let _raw = raw;
            let mut h2 = h2_accept(&listener, &tls, &h2::server::Builder::new()).await;
            let (_request, mut answer) = h2.accept().await.expect("one").expect("request");
            let _send = answer.send_response(Response::new(()), false).expect("answer");
            while h2.accept().await.is_some() {}
        };
        let pool = Pool::new(Config::default());
        tokio::select! {
            () = first => panic!("the server ends first"),
            stream = open(&pool, addr, &tls.client) => drop(stream.expect("open")),
        }
    });
}

/// A peer that takes no streams is not dialled without end.
#[test]
fn a_peer_that_takes_no_streams_is_given_up() {
    local(async {
        let tls = tls();
        let (listener, addr) = h2_listener().await;
        let mut builder = h2::server::Builder::new();
        builder.max_concurrent_streams(0);
        let (_tasks, accepted) = h2_accept_all(listener, tls.clone(), builder);
        let pool = Pool::new(Config::default());
        let error = open(&pool, addr, &tls.client).await.expect_err("no room anywhere");
        assert!(accepted.get() <= 64, "{} after {error}", accepted.get());
    });
}

/// Frames that no HTTP library would write: each is answered with 400, by its status alone.
#[test]
fn requests_that_no_library_would_write_are_answered_with_400() {
    // `:method: CONNECT` alone; with an upper-case name; with :path; :authority twice; a field before :authority.
    let method = b"\x02\x07CONNECT";
    let authority = b"\x01\x03a:1";
    for block in [
        method.to_vec(),
        [&method[..], authority, b"\x00\x01X\x011"].concat(),
        [&method[..], authority, b"\x84"].concat(),
        [&method[..], authority, authority].concat(),
        [&method[..], b"\x00\x01x\x011", authority].concat(),
        [&method[..], b"\x01\x05a@b:1"].concat(),
        [&method[..], authority, b"\x00\x01x\x02a\n"].concat(),
    ] {
        local(async {
            let tls = tls();
            let server = Server::start(&tls, Config::default(), echo).await;
            let mut client = raw_client(server.addr, &tls).await;
            let bytes = [PREFACE, &frame(4, 0, 0, &[]), &frame(1, 5, 1, &block)].concat();
            client.write_all(&bytes).await.expect("write");
            // `:status: 400`, with its name from the static table (8), in HEADERS that end the stream.
            let status = b"\x08\x03400";
            let mut got = Vec::new();
            while !got.windows(status.len()).any(|window| window == status) {
                let mut buffer = [0; 4096];
                let n = client.read(&mut buffer).await.expect("read");
                assert_ne!(n, 0, "closed instead of answered: {block:?}");
                got.extend_from_slice(&buffer[..n]);
            }
        });
    }
}

/// A client that asks much before it reads anything is held back, and then gets every answer.
#[test]
fn held_back_questions_are_answered_once_the_client_reads() {
    const PINGS: usize = 600_000;
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let socket = tokio::net::TcpSocket::new_v4().expect("socket");
        socket.set_recv_buffer_size(64 << 10).expect("a small buffer, so that the answers fill it");
        let tcp = socket.connect(server.addr).await.expect("connect");
        let name = rustls::pki_types::ServerName::IpAddress(server.addr.ip().into());
        let mut client = TlsConnector::from(tls.client.clone()).connect(name, tcp).await.expect("TLS");
        client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.expect("write");
        let (mut read, mut write) = tokio::io::split(client);
        let ask = async {
            let chunk = frame(6, 0, 0, &[1; 8]).repeat(1000);
            for _ in 0..PINGS / 1000 {
                write.write_all(&chunk).await.expect("write");
            }
            write.flush().await.expect("flush");
        };
        let hear = async {
            // Long enough for every buffer to fill up.
            sleep(Duration::from_millis(300)).await;
            let mut got = 0;
            let mut buffer = vec![0; 64 << 10];
            while got < PINGS * 17 {
                let n = read.read(&mut buffer).await.expect("read");
                assert_ne!(n, 0, "closed after {got} bytes");
                got += n;
            }
        };
        tokio::join!(ask, hear);
    });
}

/// More requests at once than connections have room for: nobody is forgotten, and no connection is opened in vain.
#[test]
fn a_burst_of_requests_gets_as_many_connections_as_it_needs() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let streams = futures_util::future::join_all((0..250).map(|_| open(&pool, server.addr, &tls.client))).await;
        assert!(streams.iter().all(Result::is_ok));
        assert_eq!(server.accepted.get(), 3);
    });
}

/// Two ends of one connection on loopback: the application's, and the proxy's.
async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let (app, near) = tokio::join!(TcpStream::connect(listener.local_addr().expect("address")), listener.accept());
    (app.expect("connect"), near.expect("accept").0)
}

/// An application that dies is noticed even while the tunnel takes nothing from it.
#[test]
fn a_reset_is_noticed_while_the_tunnel_is_stalled() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            let _stream = accepted(incoming).await;
            std::future::pending::<()>().await;
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let (mut app, near) = socket_pair().await;
        let stream = open(&pool, server.addr, &tls.client).await.expect("open");
        let counters = Counters::default();
        let dies = async {
            let block = vec![0; 64 << 10];
            while let Ok(written) = timeout(Duration::from_millis(200), app.write_all(&block)).await {
                written.expect("write");
            }
            linger_zero(app);
        };
        let (outcome, ()) = tokio::join!(copy::bidirectional(ResetOnClose::new(near), stream, &counters), dies);
        let near_reset =
            matches!(outcome, copy::CopyOutcome::Cut { side: copy::Side::Near, cause: copy::Cause::Reset });
        assert!(near_reset, "{outcome:?}");
    });
}

/// A stream that is cut off is noticed even while the application takes nothing.
#[test]
fn a_cut_is_noticed_while_the_socket_is_stalled() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            let mut stream = accepted(incoming).await;
            assert_eq!(stream.read().await, Ok(None), "the application has ended its direction");
            let block = vec![0; 64 << 10];
            while timeout(Duration::from_millis(200), stream.write(&block)).await.is_ok() {}
            stream.reset(code::CONNECT_ERROR);
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let pool = Pool::new(Config::default());
        let (mut app, near) = socket_pair().await;
        app.shutdown().await.expect("shutdown");
        let stream = open(&pool, server.addr, &tls.client).await.expect("open");
        let counters = Counters::default();
        let outcome = copy::bidirectional(ResetOnClose::new(near), stream, &counters).await;
        let far_reset = matches!(outcome, copy::CopyOutcome::Cut { side: copy::Side::Far, cause: copy::Cause::Reset });
        assert!(far_reset, "{outcome:?}");
        let mut sink = vec![0; 1 << 20];
        while app.read(&mut sink).await.expect_or_reset() {}
    });
}

trait ExpectOrReset {
    fn expect_or_reset(self) -> bool;
}

impl ExpectOrReset for std::io::Result<usize> {
    /// `false` once the connection is reset; an orderly end is wrong.
    fn expect_or_reset(self) -> bool {
        match self {
            Ok(n) => {
                assert_ne!(n, 0, "a truncated transfer looks finished");
                true
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                false
            }
        }
    }
}

/// A stream in bulk leaves room for one that says a word at a time.
#[test]
fn bulk_does_not_starve_a_dialogue() {
    local(async {
        let tls = tls();
        let server = Server::start(&tls, Config::default(), echo).await;
        let pool = Pool::new(Config::default());
        let mut bulk = JoinSet::new();
        for _ in 0..4 {
            let (mut read, mut write) = open(&pool, server.addr, &tls.client).await.expect("open").split();
            bulk.spawn_local(async move { while let Ok(Some(_)) = read.read().await {} });
            bulk.spawn_local(async move { while write.write(&[7; 64 << 10]).await.is_ok() {} });
        }
        let mut stream = open(&pool, server.addr, &tls.client).await.expect("open");
        for _ in 0..20 {
            stream.write(b"word").await.expect("write");
            let answer = timeout(Duration::from_secs(20), stream.read()).await.expect("starved");
            assert_eq!(answer.expect("read").as_deref(), Some(&b"word"[..]));
        }
        assert_eq!(server.accepted.get(), 1);
    });
}

/// The connection's window is given back on arrival, whoever reads or does not.
#[test]
fn the_connections_window_is_filled_up_while_nobody_reads() {
    local(async {
        let tls = tls();
        let handler = |incoming: Incoming| async move {
            let _stream = accepted(incoming).await;
            std::future::pending::<()>().await;
        };
        let server = Server::start(&tls, Config::default(), handler).await;
        let mut client = raw_client(server.addr, &tls).await;
        client.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.expect("write");
        for stream in [1, 3] {
            client.write_all(&frame(1, 4, stream, HEADERS)).await.expect("write");
            for _ in 0..12 {
                client.write_all(&frame(0, 0, stream, &[7; 16 << 10])).await.expect("write");
            }
        }
        // What the first 256 KiB used up.
        let mut got = Vec::new();
        let filled = |got: &[u8]| {
            got.windows(13).any(|window| {
                let increment = u32::from_be_bytes(window[9..].try_into().expect("four bytes"));
                window[..9] == [0, 0, 4, 8, 0, 0, 0, 0, 0] && (256 << 10..300 << 10).contains(&increment)
            })
        };
        while !filled(&got) {
            let mut buffer = [0; 4096];
            let n = client.read(&mut buffer).await.expect("read");
            assert_ne!(n, 0, "closed");
            got.extend_from_slice(&buffer[..n]);
        }
    });
}
