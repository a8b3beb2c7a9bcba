//! Moves the bytes of one connection between its socket and its [`Core`], answers for its life, and closes it.

use std::{
    cell::RefCell,
    future::Future as _,
    io,
    net::Shutdown,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut as _, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Instant, Sleep},
};
use tracing::warn;

use super::connection::{Core, End, Shared};
use crate::{busy_poll, tunnel::Config};

/// Most bytes read from a socket at once: eight full records.
const READ: usize = 128 << 10;
/// Read buffers that a thread keeps to use again.
const MAX_BLOCKS: usize = 8;
/// How long the peer may take to close after us. Closing at once would reset the connection if the peer's last frames
/// were unread, and take our last ones along.
const LINGER: Duration = Duration::from_secs(1);

thread_local! {
    /// Memory that sockets are read into; it comes back when the last slice of it has been passed on, so that
    /// connections with nothing to read hold none.
    static BLOCKS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// The task of one connection. Polled until it is ready, which is when nothing more can be sent or received.
pub(super) struct Driver {
    tcp: TcpStream,
    core: Shared,
    keepalive: Keepalive,
    state: State,
}

enum State {
    Open,
    /// The last bytes are in the outbox, close_notify among them.
    Flushing,
    /// FIN is sent; waiting for the peer's.
    Lingering,
}

impl Driver {
    pub(super) fn new(tcp: TcpStream, core: Shared, config: &Config) -> Self {
        if let Err(error) = tune(&tcp) {
            // Slower, or slower to notice a dead peer; not wrong.
            warn!(%error, "set the options of a tunnel's socket");
        }
        Self { tcp, core, keepalive: Keepalive::new(config), state: State::Open }
    }

    /// Works until there is nothing to do; ready at the end of the connection.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        busy_poll::worked();
        let shared = Rc::clone(&self.core);
        let mut core = shared.borrow_mut();
        core.register_driver(cx);
        self.keepalive.poll(&mut core, cx);
        if !matches!(self.state, State::Open) && self.keepalive.poll_limit(cx).is_ready() {
            return Poll::Ready(());
        }
        let blocked = core.blocked();
        if let State::Open | State::Flushing = self.state {
            self.read(&mut core, cx);
            if core.end().is_some() && matches!(self.state, State::Open) {
                core.seal_close();
                self.state = State::Flushing;
                self.keepalive.limit(LINGER);
            }
            if let Err(error) = self.write(&mut core, cx) {
                self.last_words(&mut core);
                core.finish(End::Lost(error.to_string().into()));
                return Poll::Ready(());
            }
            if let Some(End::Lost(_)) = core.end() {
                // Nobody is there to wait for.
                return Poll::Ready(());
            }
            if let State::Flushing = self.state {
                if !core.outgoing().is_empty() {
                    return Poll::Pending;
                }
                // Fails if the peer has gone, and then there is nobody to tell.
                let _ = SockRef::from(&self.tcp).shutdown(Shutdown::Write);
                self.state = State::Lingering;
            }
        }
        match self.state {
            State::Open | State::Flushing => {
                if blocked && !core.blocked() {
                    // Reading goes on, and nobody else will say so.
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
            State::Lingering => {
                drop(core);
                self.linger(cx)
            }
        }
    }

    /// One read, so that those who take what came have their turn before the next.
    fn read(&mut self, core: &mut Core, cx: &mut Context<'_>) {
        if core.blocked() || core.end().is_some() {
            return;
        }
        loop {
            match self.tcp.poll_read_ready(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return core.finish(End::Lost(error.to_string().into())),
            }
            match read_block(&self.tcp, core) {
                Ok(false) => return core.eof(),
                Ok(true) => {
                    cx.waker().wake_by_ref();
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return core.finish(End::Lost(error.to_string().into())),
            }
        }
    }

    fn write(&mut self, core: &mut Core, cx: &mut Context<'_>) -> io::Result<()> {
        loop {
            let outgoing = core.outgoing();
            if outgoing.is_empty() {
                return Ok(());
            }
            match self.tcp.try_write(outgoing) {
                Ok(written) => core.sent(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.tcp.poll_write_ready(cx) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(ready) => ready?,
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// The peer has closed: what it said before, such as an alert or the rest of an answer, tells more than that we cannot
    /// write. None of it is answered; and whoever left so many answers unread that we had stopped reading said enough.
    fn last_words(&mut self, core: &mut Core) {
        if core.blocked() {
            return;
        }
        while core.end().is_none() && matches!(read_block(&self.tcp, core), Ok(true)) {
            core.drop_control();
        }
    }

    fn linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut ignored = [0; 4096];
        loop {
            match self.tcp.poll_read_ready(cx) {
                Poll::Ready(Ok(())) => match self.tcp.try_read(&mut ignored) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Ok(0) | Err(_) => return Poll::Ready(()),
                },
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.core.borrow_mut().finish(End::Lost("the connection was given up".into()));
    }
}

/// §14.3: NODELAY, and keepalive after 180 s, every 180 s, 9 times.
fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let every = Duration::from_secs(180);
    let keepalive = TcpKeepalive::new().with_time(every).with_interval(every).with_retries(9);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

/// Reads once and gives it to `core`; `false` at the end.
fn read_block(tcp: &TcpStream, core: &mut Core) -> io::Result<bool> {
    let mut block = BLOCKS.with_borrow_mut(|blocks| {
        let whole = |block: &mut BytesMut| block.capacity() >= READ || block.try_reclaim(READ);
        match blocks.iter_mut().position(whole) {
            Some(at) => blocks.swap_remove(at),
            None => BytesMut::with_capacity(2 * READ),
        }
    });
    // The start of a record that was read before its end had come.
    block.extend_from_slice(core.partial());
    let before = block.len();
    let most = READ - before.min(READ / 2);
    let read = tcp.try_read_buf(&mut (&mut block).limit(most));
    let filled = block.split();
    BLOCKS.with_borrow_mut(|blocks| {
        if blocks.len() < MAX_BLOCKS {
            blocks.push(block);
        }
    });
    let n = read?;
    if n == 0 {
        return Ok(false);
    }
    if n < most {
        // The socket is empty: say so to the reactor, instead of asking the kernel to hear it.
        let _ = tcp.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
    }
    core.receive(filled);
    Ok(true)
}

/// PING every `ping_interval`; the connection is dead if one is not answered within `ping_timeout` (§14.3).
struct Keepalive {
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    interval: Duration,
    timeout: Duration,
}

impl Keepalive {
    fn new(config: &Config) -> Self {
        Self {
            timer: Box::pin(tokio::time::sleep(config.ping_interval)),
            waiting: false,
            interval: config.ping_interval,
            timeout: config.ping_timeout,
        }
    }

    fn poll(&mut self, core: &mut Core, cx: &mut Context<'_>) {
        while core.end().is_none() {
            if self.waiting && !core.ping_unanswered() {
                self.waiting = false;
                self.timer.as_mut().reset(Instant::now() + self.interval);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return;
            }
            if self.waiting {
                return core.finish(End::Lost("no answer to PING".into()));
            }
            core.ping();
            self.waiting = true;
            self.timer.as_mut().reset(Instant::now() + self.timeout);
        }
    }

    /// From here on the timer limits how long the end may take.
    fn limit(&mut self, limit: Duration) {
        self.timer.as_mut().reset(Instant::now() + limit);
    }

    fn poll_limit(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.timer.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// §14.3
    #[tokio::test]
    async fn a_tunnels_socket_has_the_options_of_the_table() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let tcp = TcpStream::connect(listener.local_addr().expect("address")).await.expect("connect");
        tune(&tcp).expect("options");
        let socket = SockRef::from(&tcp);
        assert!(socket.tcp_nodelay().expect("option") && socket.keepalive().expect("option"));
        let every = Duration::from_secs(180);
        assert_eq!(socket.tcp_keepalive_time().expect("option"), every);
        assert_eq!(socket.tcp_keepalive_interval().expect("option"), every);
        assert_eq!(socket.tcp_keepalive_retries().expect("option"), 9);
    }
}
