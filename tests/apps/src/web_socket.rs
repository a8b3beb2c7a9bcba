//! WebSocket (RFC 6455) through tungstenite: a server that echoes, and a client that also sees its pings answered.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::programs::Conversation;
use tungstenite::{Bytes, Message, WebSocket};

use super::Talk;

/// Every this many messages a ping is sent, and its pong waited for.
const PING_EVERY: u64 = 10;

pub(crate) fn serve(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listen on {listen}"))?;
    // Each connection has a thread, and the scope owns them all; the server runs until it is ended.
    thread::scope(|scope| {
        for stream in listener.incoming() {
            let stream = stream.context("accept")?;
            scope.spawn(move || {
                if let Err(error) = echo(stream) {
                    eprintln!("a client's connection: {error:#}");
                }
            });
        }
        Ok(())
    })
}

fn echo(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut socket = tungstenite::accept(stream).map_err(|error| anyhow::anyhow!("upgrade: {error}"))?;
    loop {
        match socket.read() {
            Ok(message @ (Message::Text(_) | Message::Binary(_))) => socket.send(message)?,
            // Pings are answered by the library when the next message is read or sent.
            Ok(_) => socket.flush()?,
            Err(tungstenite::Error::ConnectionClosed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

pub(crate) fn talk(talk: &Talk) -> Conversation {
    let mut told = Conversation::default();
    let begun = Instant::now();
    let result = converse(talk, &mut told);
    told.finish(begun, result)
}

fn converse(talk: &Talk, told: &mut Conversation) -> Result<()> {
    let stream = TcpStream::connect_timeout(&talk.to, talk.limit()).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(talk.limit()))?;
    let url = format!("ws://{}{}", talk.to, talk.path);
    let (mut socket, _) = tungstenite::client(url.as_str(), stream).map_err(|e| anyhow::anyhow!("upgrade: {e}"))?;
    let begun = Instant::now();
    while begun.elapsed() < talk.hold() {
        let text = talk.message(told.messages);
        let sent = Instant::now();
        socket.send(Message::text(text.clone())).context("send")?;
        match socket.read().context("read")? {
            Message::Text(back) => ensure!(back.as_str() == text, "another text came back"),
            other => bail!("{other:?} came back"),
        }
        told.answered(sent);
        if told.messages.is_multiple_of(PING_EVERY) {
            ping(&mut socket)?;
        }
        thread::sleep(talk.interval());
    }
    socket.close(None).context("close")?;
    loop {
        match socket.read() {
            Err(tungstenite::Error::ConnectionClosed) => return Ok(()),
            Err(error) => return Err(error).context("wait for the other side's close"),
            Ok(Message::Close(_)) => {}
            Ok(other) => bail!("{other:?} after the close"),
        }
    }
}

fn ping(socket: &mut WebSocket<TcpStream>) -> Result<()> {
    let payload = Bytes::from_static(b"are you there");
    socket.send(Message::Ping(payload.clone())).context("ping")?;
    match socket.read().context("wait for the pong")? {
        Message::Pong(back) if back == payload => Ok(()),
        other => bail!("{other:?} instead of the pong"),
    }
}
