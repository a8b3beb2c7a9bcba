//! The server: reads requests, swallows their bodies, answers.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use anyhow::{Result, anyhow};

use super::pattern;
use super::poll::{END, Poll, READ, WRITE, listen};

const BUFFER: usize = 256 << 10;
/// Key of the listener.
const LISTENER: usize = usize::MAX;

pub(super) fn run(port: u16, threads: usize) -> Result<()> {
    // All listen before one serves, so that connections are spread from the first on.
    let listeners: Vec<TcpListener> = (0..threads.max(1)).map(|_| listen(port)).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let all: Vec<_> = listeners.into_iter().map(|listener| scope.spawn(move || serve(&listener))).collect();
        for one in all {
            one.join().map_err(|_| anyhow!("a thread of the server panicked"))??;
        }
        Ok(())
    })
}

/// One connection.
struct Client {
    stream: TcpStream,
    header: [u8; 16],
    header_got: usize,
    /// Bytes of the body still to come.
    body: u64,
    /// Those that came.
    swallowed: u64,
    /// The answer that the request asks for.
    answer: u64,
    /// Bytes of answers still to be sent.
    out: u64,
    /// Whether readiness to write is watched.
    armed: bool,
}

fn serve(listener: &TcpListener) -> Result<()> {
    let mut poll = Poll::new()?;
    poll.add(listener, READ, LISTENER)?;
    // By descriptor, which the kernel keeps small.
    let mut clients: Vec<Option<Client>> = Vec::new();
    let mut free = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let bytes = pattern(BUFFER);
    loop {
        for index in 0..poll.wait(None) {
            let (key, ready) = poll.event(index);
            if key == LISTENER {
                accept(listener, &poll, &mut clients, &mut free)?;
                continue;
            }
            let Some(client) = &mut clients[key] else { continue };
            match client.go_on(ready, &mut buffer, &bytes) {
                Ok(true) => {
                    let wanted = client.out > 0;
                    if wanted != client.armed {
                        client.armed = wanted;
                        poll.change(&client.stream, if wanted { READ | WRITE } else { READ }, key)?;
                    }
                }
                // The connection's end, orderly or not, is the client's to judge.
                Ok(false) | Err(_) => {
                    clients[key] = None;
                    free.push(key);
                }
            }
        }
    }
}

fn accept(listener: &TcpListener, poll: &Poll, clients: &mut Vec<Option<Client>>, free: &mut Vec<usize>) -> Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // Nobody more; or one that is gone again.
            Err(_) => return Ok(()),
        };
        // It may have been ended already, by a policy for example.
        if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
            continue;
        }
        let key = free.pop().unwrap_or_else(|| {
            clients.push(None);
            clients.len() - 1
        });
        poll.add(&stream, READ, key)?;
        clients[key] = Some(Client {
            stream,
            header: [0; 16],
            header_got: 0,
            body: 0,
            swallowed: 0,
            answer: 0,
            out: 0,
            armed: false,
        });
    }
}

impl Client {
    /// Reads and answers what is there; false at the end.
    fn go_on(&mut self, ready: u32, buffer: &mut [u8], bytes: &[u8]) -> io::Result<bool> {
        if ready & (READ | END) != 0 {
            match self.stream.read(buffer) {
                Ok(0) => return self.ended(),
                Ok(got) => self.take(&buffer[..got]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        while self.out > 0 {
            let now = usize::try_from(self.out).unwrap_or(usize::MAX).min(bytes.len());
            match self.stream.write(&bytes[..now]) {
                Ok(sent) => self.out -= sent as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn take(&mut self, mut got: &[u8]) {
        while !got.is_empty() {
            if self.header_got < self.header.len() {
                let now = (self.header.len() - self.header_got).min(got.len());
                self.header[self.header_got..self.header_got + now].copy_from_slice(&got[..now]);
                self.header_got += now;
                got = &got[now..];
                if self.header_got < self.header.len() {
                    return;
                }
                let number = |at: usize| u64::from_le_bytes(self.header[at..at + 8].try_into().expect("eight bytes"));
                (self.body, self.answer, self.swallowed) = (number(0), number(8), 0);
            }
            let now = usize::try_from(self.body).unwrap_or(usize::MAX).min(got.len());
            self.body -= now as u64;
            self.swallowed += now as u64;
            got = &got[now..];
            if self.body == 0 {
                self.out = self.out.saturating_add(self.answer);
                self.header_got = 0;
            }
        }
    }

    /// The client has ended its side: within a body, it is told how much of it came.
    fn ended(&mut self) -> io::Result<bool> {
        if self.body > 0 {
            self.stream.write_all(&self.swallowed.to_le_bytes())?;
        }
        Ok(false)
    }
}
