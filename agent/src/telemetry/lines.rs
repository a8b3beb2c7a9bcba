//! Lines on their way to standard output or standard error: a bounded queue, and a thread that writes.
//!
//! What a line says is the caller's business. Nobody who has one to write waits for whoever reads them: what finds no room
//! in the queue is dropped and counted.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tracing::warn;

/// Most bytes that are written at once, but for the end of the last line.
const BATCH_BYTES: usize = 64 << 10;

/// One way out.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// What the lines are, as in "the access log"; it names the thread too.
    pub name: &'static str,
    /// Lines that may wait to be written.
    pub queue: usize,
    /// Pause after a batch, in which the next one gathers.
    pub gather: Duration,
}

/// Where lines are put in; cheap to clone.
#[derive(Clone, Debug)]
pub struct Lines {
    queue: mpsc::SyncSender<Order>,
    dropped: Arc<AtomicU64>,
}

/// The thread that writes. It ends when this is dropped, or [`Writer::finish`]ed.
#[derive(Debug)]
pub struct Writer {
    name: &'static str,
    queue: mpsc::SyncSender<Order>,
    done: mpsc::Receiver<()>,
    thread: Option<thread::JoinHandle<()>>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Order {
    Line(Vec<u8>),
    Stop,
}

/// Another descriptor of standard output or standard error, past the buffers and locks of the standard library.
///
/// # Errors
/// No descriptor is left.
pub fn past_std(stream: &impl AsFd) -> io::Result<File> {
    stream.as_fd().try_clone_to_owned().map(File::from)
}

/// Starts the thread; each batch of whole lines is one `write_all`.
///
/// # Errors
/// No thread could be started.
pub fn start(config: Config, out: impl Write + Send + 'static) -> io::Result<(Lines, Writer)> {
    let (queue, orders) = mpsc::sync_channel(config.queue.max(1));
    let (done_sender, done) = mpsc::sync_channel(1);
    let dropped = Arc::new(AtomicU64::new(0));
    let in_thread = dropped.clone();
    let thread = thread::Builder::new().name(config.name.replace(' ', "-")).spawn(move || {
        write(&config, &orders, out, &in_thread);
        // The owner may have given up waiting; then nobody needs to know.
        let _ = done_sender.send(());
    })?;
    let lines = Lines { queue: queue.clone(), dropped: dropped.clone() };
    Ok((lines, Writer { name: config.name, queue, done, thread: Some(thread), dropped }))
}

impl Lines {
    /// Puts a line, with its newline, into the queue, or drops it if the queue is full. Never blocks.
    pub fn put(&self, line: Vec<u8>) {
        if self.queue.try_send(Order::Line(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many lines were dropped so far: the queue was full, or they could not be written.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Each write is a line, as those of [`tracing_subscriber::fmt`] are.
impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line.to_vec());
        Ok(line.len())
    }

    /// Does nothing: [`Writer::finish`] waits for what is queued.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Writer {
    /// Writes what is queued, stops and joins the thread. Lines that come later are dropped.
    ///
    /// Returns how many lines were dropped in all.
    ///
    /// # Errors
    /// `TimedOut` if the reader took nothing for `patience`. The thread is then left behind in its system call, for the
    /// end of the process to take.
    pub fn finish(mut self, patience: Duration) -> io::Result<u64> {
        self.end(patience)?;
        Ok(self.dropped.load(Ordering::Relaxed))
    }

    fn end(&mut self, patience: Duration) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let timed_out =
            || io::Error::new(io::ErrorKind::TimedOut, format!("the reader of the {} does not read", self.name));
        let deadline = Instant::now() + patience;
        while let Err(mpsc::TrySendError::Full(_)) = self.queue.try_send(Order::Stop) {
            if Instant::now() >= deadline {
                return Err(timed_out());
            }
            thread::sleep(Duration::from_millis(1));
        }
        if let Err(mpsc::RecvTimeoutError::Timeout) =
            self.done.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            return Err(timed_out());
        }
        thread.join().map_err(|_| io::Error::other(format!("the thread of the {} panicked", self.name)))
    }
}

impl Drop for Writer {
    /// Also where a panic unwinds the thread that holds it: what the panic has said is written.
    fn drop(&mut self) {
        if let Err(error) = self.end(Duration::from_secs(1)) {
            warn!(%error, "end the {}", self.name);
        }
    }
}

/// The body of the thread.
fn write(config: &Config, orders: &mpsc::Receiver<Order>, mut out: impl Write, dropped: &AtomicU64) {
    let mut batch = Vec::with_capacity(BATCH_BYTES + 4096);
    let (mut reported, mut failing) = (0, false);
    let mut stop = false;
    while !stop {
        let (mut lines, mut next) = (0, orders.recv().ok());
        loop {
            match next {
                Some(Order::Line(line)) => {
                    batch.extend(line);
                    lines += 1;
                }
                Some(Order::Stop) => {
                    stop = true;
                    break;
                }
                None => {
                    stop = lines == 0;
                    break;
                }
            }
            if batch.len() >= BATCH_BYTES {
                break;
            }
            next = orders.try_recv().ok();
        }
        let full = batch.len() >= BATCH_BYTES;
        let written = out.write_all(&batch).and_then(|()| out.flush());
        batch.clear();
        match written {
            Err(error) => {
                dropped.fetch_add(lines, Ordering::Relaxed);
                // Not again until something was written: where this is the log itself, the line that says it comes here.
                if !std::mem::replace(&mut failing, true) {
                    warn!(%error, lines, "write to the {}", config.name);
                }
            }
            Ok(()) => {
                failing = false;
                let now = dropped.load(Ordering::Relaxed);
                if now > reported {
                    let dropped = now - reported;
                    warn!(dropped, "lines of the {} were dropped: their reader is too slow", config.name);
                    reported = now;
                }
            }
        }
        if !stop && !full {
            thread::sleep(config.gather);
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::{
        io::{self, Write},
        sync::{Arc, Condvar, Mutex},
    };

    /// A reader that can be held up.
    #[derive(Clone, Default)]
    pub(crate) struct Gate(Arc<(Mutex<GateState>, Condvar)>);

    #[derive(Default)]
    struct GateState {
        open: bool,
        writes: Vec<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut state = self.0.0.lock().expect("no panic inside");
            while !state.open {
                state = self.0.1.wait(state).expect("no panic inside");
            }
            state.writes.push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Gate {
        pub(crate) fn open(&self) {
            self.0.0.lock().expect("no panic inside").open = true;
            self.0.1.notify_all();
        }

        pub(crate) fn writes(&self) -> Vec<Vec<u8>> {
            self.0.0.lock().expect("no panic inside").writes.clone()
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests {
    use super::{testing::Gate, *};

    const CONFIG: Config = Config { name: "test log", queue: 100, gather: Duration::ZERO };

    #[test]
    fn a_panic_of_who_holds_the_writer_loses_no_line() {
        /// Takes its time, so that nothing is written yet when the panic comes.
        struct Slow(Gate);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                thread::sleep(Duration::from_millis(100));
                self.0.write(bytes)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let gate = Gate::default();
        gate.open();
        let (lines, writer) = start(CONFIG, Slow(gate.clone())).expect("a thread");
        let ended = thread::spawn(move || {
            let _writer = writer;
            (0..50).for_each(|n| lines.put(format!("line {n}\n").into_bytes()));
            panic!("the thread ends");
        });
        assert!(ended.join().is_err());
        let text = String::from_utf8(gate.writes().concat()).expect("UTF-8");
        assert_eq!(text.lines().count(), 50, "{text}");
        assert!(text.ends_with("line 49\n"), "{text}");
    }

    /// A reader that has gone is no reason to stop, and none to spin: what it does not get is counted.
    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (mut lines, writer) = start(CONFIG, Gone).expect("a thread");
        for _ in 0..20 {
            lines.write_all(b"a line\n").expect("nobody waits for the reader");
        }
        assert_eq!(writer.finish(Duration::from_secs(20)).expect("it ends"), 20);
        lines.put(b"too late\n".to_vec());
        assert_eq!(lines.dropped(), 21);
    }
}
