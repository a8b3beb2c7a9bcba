//! TLS of one connection: rustls makes the handshake, then its keys protect records where they lie in our buffers.
//!
//! rustls' own record layer reads 4 KiB at a time and copies every record twice. Its interface for record layers
//! elsewhere ([`rustls::kernel`], meant for the kernel's) gives out the traffic keys instead; what it leaves to its
//! user is here: sealing and opening records (RFC 8446 §5), key updates (§4.6.3) and alerts (§6).

use std::{io, ops::Range, sync::Arc};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{
    AlertDescription, ClientConfig, ConnectionTrafficSecrets, ServerConfig,
    client::UnbufferedClientConnection,
    kernel::KernelConnection,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus},
};
use tokio::net::TcpStream;

/// Bytes before the content of a record.
pub(super) const HEADER: usize = 5;
/// Bytes after it: the content's type and the AEAD's tag.
pub(super) const TRAILER: usize = 1 + TAG;
/// Most content bytes in one record.
pub(super) const MAX_CONTENT: usize = 1 << 14;
/// Most bytes after a record's header (RFC 8446 §5.2).
const MAX_CIPHERTEXT: usize = MAX_CONTENT + 256;
const TAG: usize = 16;
/// Records under one key. AES-GCM allows 2^24.5 (RFC 8446 §5.5). Tests use keys up quickly, against every peer.
const KEY_LIFETIME: u64 = if cfg!(test) { 100 } else { 1 << 24 };
/// Key updates in a row, without data between them, before we call it an attack.
const MAX_KEY_UPDATES: u32 = 32;
/// Bytes that we read ahead during the handshake: more than any certificate chain that makes sense.
const MAX_HANDSHAKE: usize = 128 << 10;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// Why TLS failed.
#[derive(Debug)]
pub(super) enum TlsError {
    /// By its rules: the text is our verifier's reason or the peer's alert.
    Tls(Arc<str>),
    /// The socket failed or ended.
    Io(io::Error),
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error.to_string().into())
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A connection after its handshake.
pub(super) struct Session {
    /// The peer's verified chain, leaf first.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
    keys: Box<dyn Keys>,
    /// Application data that came with the handshake.
    pub(super) early: Vec<u8>,
    /// Records that came after those.
    pub(super) unread: Vec<u8>,
    /// Bytes of handshake messages that are not whole yet.
    handshake: Vec<u8>,
    key_updates: u32,
}

trait Keys {
    fn next_tx(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error>;
    fn next_rx(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error>;
}

impl<Data> Keys for KernelConnection<Data> {
    fn next_tx(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        Ok(self.update_tx_secret()?.1)
    }

    fn next_rx(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        Ok(self.update_rx_secret()?.1)
    }
}

/// What a record was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Application data at this place in the record.
    Data(Range<usize>),
    /// Something that TLS keeps to itself; done.
    Internal,
    /// close_notify: the peer sends nothing after this.
    Closed,
}

impl Session {
    /// The client's handshake. No SNI is sent, because `name` is an address (§14.1, RFC 6066 §3).
    pub(super) async fn connect(
        tcp: &TcpStream,
        config: &ClientConfig,
        name: ServerName<'static>,
    ) -> Result<Self, TlsError> {
        let mut config = config.clone();
        config.enable_secret_extraction = true;
        let mut connection = UnbufferedClientConnection::new(config.into(), name)?;
        let process = UnbufferedConnectionCommon::<rustls::client::ClientConnectionData>::process_tls_records;
        let (early, unread) = handshake(&mut connection, process, tcp).await?;
        let certificates = owned(connection.peer_certificates());
        check_alpn(connection.alpn_protocol())?;
        let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
        Self::new(certificates, secrets, Box::new(keys), early, unread)
    }

    /// The server's handshake.
    pub(super) async fn accept(tcp: &TcpStream, config: &ServerConfig) -> Result<Self, TlsError> {
        let mut config = config.clone();
        config.enable_secret_extraction = true;
        let mut connection = UnbufferedServerConnection::new(config.into())?;
        let process = UnbufferedConnectionCommon::<rustls::server::ServerConnectionData>::process_tls_records;
        let (early, unread) = handshake(&mut connection, process, tcp).await?;
        let certificates = owned(connection.peer_certificates());
        check_alpn(connection.alpn_protocol())?;
        let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
        Self::new(certificates, secrets, Box::new(keys), early, unread)
    }

    fn new(
        certificates: Vec<CertificateDer<'static>>,
        secrets: rustls::ExtractedSecrets,
        keys: Box<dyn Keys>,
        early: Vec<u8>,
        unread: Vec<u8>,
    ) -> Result<Self, TlsError> {
        Ok(Self {
            certificates,
            sealer: Sealer { crypter: Crypter::new(secrets.tx.1, secrets.tx.0)?, rekey: false },
            opener: Opener(Crypter::new(secrets.rx.1, secrets.rx.0)?),
            keys,
            early,
            unread,
            handshake: Vec::new(),
            key_updates: 0,
        })
    }

    /// Opens one whole record in place.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<Opened, TlsError> {
        let (kind, content) = self.opener.open(record)?;
        match kind {
            APPLICATION_DATA => {
                self.key_updates = 0;
                Ok(Opened::Data(content))
            }
            ALERT => match record[content] {
                [_, 0] => Ok(Opened::Closed),
                // user_canceled announces a close_notify.
                [_, 90] => Ok(Opened::Internal),
                [_, code] => Err(rustls::Error::AlertReceived(AlertDescription::from(code)).into()),
                _ => Err(broken("an alert that is not two bytes long")),
            },
            HANDSHAKE => {
                self.handshake.extend_from_slice(&record[content]);
                self.post_handshake()?;
                Ok(Opened::Internal)
            }
            other => Err(broken(&format!("a record of type {other}"))),
        }
    }

    fn post_handshake(&mut self) -> Result<(), TlsError> {
        const NEW_SESSION_TICKET: u8 = 4;
        const KEY_UPDATE: u8 = 24;
        while let [kind, a, b, c, rest @ ..] = &self.handshake[..] {
            let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if len > MAX_CONTENT {
                return Err(broken("a handshake message too long"));
            }
            let Some(body) = rest.get(..len) else { return Ok(()) };
            match (*kind, body) {
                // Resumption is off (§14.1).
                (NEW_SESSION_TICKET, _) => {}
                (KEY_UPDATE, [requested @ (0 | 1)]) if rest.len() == 1 => {
                    self.key_updates += 1;
                    if self.key_updates > MAX_KEY_UPDATES {
                        return Err(broken("too many key updates"));
                    }
                    self.sealer.rekey |= *requested == 1;
                    self.opener = Opener(Crypter::new(self.keys.next_rx()?, 0)?);
                }
                (other, _) => return Err(broken(&format!("handshake message {other} after the handshake"))),
            }
            self.handshake.drain(..4 + len);
        }
        Ok(())
    }

    /// Whether a key update must be sent before `records` more records; see [`rekey`](Self::rekey).
    pub(super) fn rekey_due(&self, records: u64) -> bool {
        self.sealer.rekey || self.sealer.crypter.sequence + records >= KEY_LIFETIME
    }

    /// Appends a key update to `out` and seals with the next key from there on.
    pub(super) fn rekey(&mut self, out: &mut [u8]) -> Result<usize, TlsError> {
        const UPDATE_NOT_REQUESTED: [u8; 5] = [24, 0, 0, 1, 0];
        let used = self.sealer.put(out, HANDSHAKE, &UPDATE_NOT_REQUESTED)?;
        self.sealer = Sealer { crypter: Crypter::new(self.keys.next_tx()?, 0)?, rekey: false };
        Ok(used)
    }
}

fn check_alpn(selected: Option<&[u8]>) -> Result<(), TlsError> {
    if selected == Some(b"h2") { Ok(()) } else { Err(TlsError::Tls("the peer did not agree on h2 by ALPN".into())) }
}

fn owned(chain: Option<&[CertificateDer<'_>]>) -> Vec<CertificateDer<'static>> {
    chain.unwrap_or_default().iter().cloned().map(CertificateDer::into_owned).collect()
}

fn broken(what: &str) -> TlsError {
    TlsError::Tls(format!("the peer sent {what}").into())
}

/// Protects what we send. No `Debug`: it holds keys.
pub(super) struct Sealer {
    crypter: Crypter,
    /// The peer asked for new keys.
    rekey: bool,
}

impl Sealer {
    /// Seals a record of application data that lies in place: [`HEADER`] free bytes, content, [`TRAILER`] free bytes.
    pub(super) fn seal(&mut self, record: &mut [u8]) -> Result<(), TlsError> {
        self.seal_as(record, APPLICATION_DATA)
    }

    /// close_notify, written to the start of `out`; gives its length.
    pub(super) fn close(&mut self, out: &mut [u8]) -> Result<usize, TlsError> {
        self.put(out, ALERT, &[1, 0])
    }

    fn put(&mut self, out: &mut [u8], kind: u8, content: &[u8]) -> Result<usize, TlsError> {
        let record = &mut out[..HEADER + content.len() + TRAILER];
        record[HEADER..HEADER + content.len()].copy_from_slice(content);
        self.seal_as(record, kind)?;
        Ok(record.len())
    }

    fn seal_as(&mut self, record: &mut [u8], kind: u8) -> Result<(), TlsError> {
        let [high, low] = ((record.len() - HEADER) as u16).to_be_bytes();
        let (header, rest) = record.split_at_mut(HEADER);
        header.copy_from_slice(&[APPLICATION_DATA, 3, 3, high, low]);
        let (inner, tag) = rest.split_at_mut(rest.len() - TAG);
        if let Some(last) = inner.last_mut() {
            *last = kind;
        }
        let nonce = self.crypter.nonce();
        let sealed = self.crypter.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| broken("nothing wrong, but sealing failed"))?.as_ref());
        Ok(())
    }
}

/// Checks and opens what the peer sends. No `Debug`: it holds keys.
pub(super) struct Opener(Crypter);

impl Opener {
    fn open(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), TlsError> {
        let (header, rest) = record.split_at_mut(HEADER);
        if header[0] != APPLICATION_DATA {
            return Err(broken("a record that is not protected"));
        }
        let nonce = self.0.nonce();
        let plain = self.0.key.open_in_place(nonce, Aad::from(&*header), rest);
        let plain = plain.map_err(|_| TlsError::from(rustls::Error::DecryptError))?;
        // The content's type is the last byte that is not padding.
        let end = plain.iter().rposition(|b| *b != 0).ok_or_else(|| broken("a record without a type"))?;
        if end > MAX_CONTENT {
            return Err(broken("a record too long"));
        }
        Ok((plain[end], HEADER..HEADER + end))
    }
}

/// Length of the record that starts `bytes`, header included; `None` if not even its header is whole.
pub(super) fn record_len(bytes: &[u8]) -> Result<Option<usize>, TlsError> {
    let [_, _, _, high, low, ..] = bytes else { return Ok(None) };
    match u16::from_be_bytes([*high, *low]) as usize {
        len if !(TRAILER..=MAX_CIPHERTEXT).contains(&len) => Err(broken("a record of impossible length")),
        len => Ok(Some(HEADER + len)),
    }
}

struct Crypter {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Crypter {
    fn new(secrets: ConnectionTrafficSecrets, sequence: u64) -> Result<Self, TlsError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(TlsError::Tls("a cipher suite that we cannot use".into())),
        };
        let key =
            UnboundKey::new(algorithm, key.as_ref()).map_err(|_| TlsError::Tls("a key that is not one".into()))?;
        let mut nonce = [0; 12];
        nonce.copy_from_slice(iv.as_ref());
        Ok(Self { key: LessSafeKey::new(key), iv: nonce, sequence })
    }

    /// RFC 8446 §5.3. Never the same twice: the sequence number only grows, and a key ends long before it wraps.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

type Process<Data> =
    for<'c, 'i> fn(&'c mut UnbufferedConnectionCommon<Data>, &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Data>;

/// Gives application data that came with the last records, and the bytes after those.
async fn handshake<Data>(
    connection: &mut UnbufferedConnectionCommon<Data>,
    process: Process<Data>,
    tcp: &TcpStream,
) -> Result<(Vec<u8>, Vec<u8>), TlsError> {
    enum Next {
        Again,
        Send,
        Read,
        Done,
    }
    let (mut incoming, mut outgoing, mut early) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let UnbufferedStatus { mut discard, state, .. } = process(connection, &mut incoming);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(&mut outgoing, |out| data.encode(out))?;
                Next::Again
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Next::Send
            }
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    discard += record.discard;
                    early.extend_from_slice(record.payload);
                }
                Next::Again
            }
            Ok(ConnectionState::BlockedHandshake) => Next::Read,
            Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
            Ok(_) => return Err(TlsError::Io(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => {
                incoming.drain(..discard);
                outgoing.clear();
                // Only as long as there is something to send: after that, rustls would judge what it has refused again.
                while connection.wants_write() {
                    let UnbufferedStatus { discard, state, .. } = process(connection, &mut incoming);
                    let Ok(ConnectionState::EncodeTlsData(mut data)) = state else { break };
                    encode(&mut outgoing, |out| data.encode(out))?;
                    incoming.drain(..discard);
                }
                // The alert is a courtesy; the error is what matters.
                let _ = send(tcp, &outgoing).await;
                return Err(error.into());
            }
        };
        incoming.drain(..discard);
        match next {
            Next::Again => {}
            Next::Done => return Ok((early, incoming)),
            Next::Send => {
                send(tcp, &outgoing).await?;
                outgoing.clear();
            }
            Next::Read => {
                if incoming.len() >= MAX_HANDSHAKE {
                    return Err(broken("a handshake too long"));
                }
                tcp.readable().await?;
                incoming.reserve(8 << 10);
                match tcp.try_read_buf(&mut incoming) {
                    Ok(0) => return Err(TlsError::Io(io::ErrorKind::UnexpectedEof.into())),
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                    _ => {}
                }
            }
        }
    }
}

fn encode(out: &mut Vec<u8>, mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>) -> Result<(), TlsError> {
    let used = out.len();
    if let Err(EncodeError::InsufficientSize(size)) = encode(&mut []) {
        out.resize(used + size.required_size, 0);
        encode(&mut out[used..]).map_err(|error| TlsError::Tls(error.to_string().into()))?;
    }
    Ok(())
}

async fn send(tcp: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        tcp.writable().await?;
        match tcp.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::tunnel::testing::{local, tls};

    async fn sessions() -> (Session, Session) {
        let configs = tls();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        let (client, server) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (client, (server, _)) = (client.expect("connect"), server.expect("accept"));
        let name = ServerName::IpAddress(addr.ip().into());
        let (client, server) =
            tokio::join!(Session::connect(&client, &configs.client, name), Session::accept(&server, &configs.server));
        let both = (client.map_err(debug).expect("client"), server.map_err(debug).expect("server"));
        assert_eq!(both.1.certificates.len(), 1, "the client showed its certificate");
        both
    }

    fn debug(error: TlsError) -> String {
        format!("{error:?}")
    }

    fn sealed(session: &mut Session, kind: u8, content: &[u8]) -> Vec<u8> {
        let mut record = vec![0; HEADER + content.len() + TRAILER];
        let len = session.sealer.put(&mut record, kind, content).map_err(debug).expect("sealed");
        assert_eq!(len, record.len());
        record
    }

    fn content(session: &mut Session, mut record: Vec<u8>) -> Result<Vec<u8>, String> {
        match session.open(&mut record).map_err(debug)? {
            Opened::Data(place) => Ok(record[place].to_vec()),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn records_cross_in_order_and_only_whole() {
        local(async {
            let (mut client, mut server) = sessions().await;
            for size in [0, 1, 100, MAX_CONTENT] {
                let record = sealed(&mut client, APPLICATION_DATA, &vec![7; size]);
                assert_eq!(record_len(&record).map_err(debug), Ok(Some(record.len())));
                assert_eq!(content(&mut server, record), Ok(vec![7; size]));
            }
            let mut changed = sealed(&mut client, APPLICATION_DATA, b"secret");
            *changed.last_mut().expect("not empty") ^= 1;
            assert!(content(&mut server, changed).is_err(), "a changed record");
            let (mut client, mut server) = sessions().await;
            let first = sealed(&mut client, APPLICATION_DATA, b"first");
            let second = sealed(&mut client, APPLICATION_DATA, b"second");
            assert!(content(&mut server, second).is_err(), "a record too early");
            let (mut client, mut server) = sessions().await;
            assert!(content(&mut server, first).is_err(), "a record of another connection");
            let record = sealed(&mut client, APPLICATION_DATA, b"once");
            let (mut client, mut server) = sessions().await;
            let own = sealed(&mut client, APPLICATION_DATA, b"once");
            assert_ne!(record, own, "keys are of one connection");
            assert_eq!(content(&mut server, own.clone()), Ok(b"once".to_vec()));
            assert!(content(&mut server, own).is_err(), "a record twice");
        });
    }

    /// RFC 8446 §4.6.3: who is asked for new keys sends with new keys; who announces them does.
    #[test]
    fn a_requested_key_update_is_answered() {
        local(async {
            let (mut client, mut server) = sessions().await;
            let request = sealed(&mut client, HANDSHAKE, &[24, 0, 0, 1, 1]);
            let secret = client.keys.next_tx().expect("next key");
            client.sealer = Sealer { crypter: Crypter::new(secret, 0).map_err(debug).expect("key"), rekey: false };
            assert!(!server.rekey_due(0));
            assert_eq!(content(&mut server, request), Err("Internal".to_owned()));
            let record = sealed(&mut client, APPLICATION_DATA, b"new key");
            assert_eq!(content(&mut server, record), Ok(b"new key".to_vec()));
            assert!(server.rekey_due(0));
            let mut answer = vec![0; 100];
            let len = server.rekey(&mut answer).map_err(debug).expect("rekeyed");
            answer.truncate(len);
            assert!(!server.rekey_due(0));
            assert_eq!(content(&mut client, answer), Err("Internal".to_owned()));
            let record = sealed(&mut server, APPLICATION_DATA, b"new key, too");
            assert_eq!(content(&mut client, record), Ok(b"new key, too".to_vec()));
        });
    }

    #[test]
    fn what_must_not_come_after_the_handshake_is_refused() {
        for (kind, bytes) in [
            (HANDSHAKE, &[24, 0, 0, 1, 2][..]), // an impossible request
            (HANDSHAKE, &[24, 0, 0, 1, 0, 4]),  // something behind a key update
            (HANDSHAKE, &[13, 0, 0, 0]),        // CertificateRequest
            (HANDSHAKE, &[4, 1, 0, 0]),         // a message of 64 KiB
            (ALERT, &[2, 40]),                  // handshake_failure
            (ALERT, &[1]),
            (20, &[1]),    // ChangeCipherSpec
            (0, &[0; 10]), // no type at all
        ] {
            local(async {
                let (mut client, mut server) = sessions().await;
                let mut record = sealed(&mut client, kind, bytes);
                assert!(server.open(&mut record).is_err(), "{kind} {bytes:?}");
            });
        }
        local(async {
            let (mut client, mut server) = sessions().await;
            let mut close = vec![0; 100];
            let len = client.sealer.close(&mut close).map_err(debug).expect("sealed");
            assert_eq!(server.open(&mut close[..len]).map_err(debug), Ok(Opened::Closed));
            let mut clear = vec![22, 3, 3, 0, 17];
            clear.extend([0; 17]);
            assert!(server.open(&mut clear).is_err(), "a record in the clear");
            for record in [[23, 3, 3, 0xff, 0xff], [23, 3, 3, 0, 16]] {
                assert!(record_len(&record).is_err());
            }
            assert!(matches!(record_len(&[23, 3, 3, 0]), Ok(None)));
        });
    }

    /// More key updates than anybody needs are an attack on our CPU.
    #[test]
    fn endless_key_updates_are_refused() {
        local(async {
            let (mut client, mut server) = sessions().await;
            let mut updates = 0;
            loop {
                let mut record = vec![0; 100];
                let len = client.rekey(&mut record).map_err(debug).expect("rekeyed");
                if server.open(&mut record[..len]).is_err() {
                    break;
                }
                updates += 1;
            }
            assert_eq!(updates, MAX_KEY_UPDATES);
        });
    }
}
