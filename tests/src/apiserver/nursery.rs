//! Processes that end with this one, however it ends.
//!
//! The kernel sends the signal that PR_SET_PDEATHSIG asks for when the *thread* that started the process ends (prctl(2)), and a
//! test's thread ends with the test. So one thread, which lives as long as the nursery, starts them all.

use std::io;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use crate::command;

/// What is to be started, and where the answer goes.
type Wish = (Command, Sender<io::Result<Child>>);

/// Starts processes. Whoever asked for one ends it and waits for it; when the nursery is dropped, the kernel kills the rest.
#[derive(Debug)]
pub(super) struct Nursery {
    wishes: Option<Sender<Wish>>,
    thread: Option<JoinHandle<()>>,
}

impl Nursery {
    pub(super) fn open() -> Result<Self> {
        let (wishes, asked) = mpsc::channel::<Wish>();
        let starter = thread::Builder::new().name("nursery".to_owned()).spawn(move || {
            for (mut command, answer) in asked {
                // Nobody waits for the answer any more only if its own thread has panicked; then the process ends with ours.
                let _ = answer.send(command.spawn());
            }
        });
        Ok(Self { wishes: Some(wishes), thread: Some(starter.context("start the thread that starts processes")?) })
    }

    /// Starts a process, in a process group of its own.
    pub(super) fn start(&self, mut wanted: Command) -> Result<Child> {
        let shown = command::describe(&wanted);
        command::end_with_starter(&mut wanted);
        let (answer, answered) = mpsc::channel();
        let gone = "the thread that starts processes has ended";
        self.wishes.as_ref().context(gone)?.send((wanted, answer)).ok().context(gone)?;
        answered.recv().context(gone)?.with_context(|| format!("start `{shown}`"))
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        self.wishes = None;
        if let Some(thread) = self.thread.take() {
            // One that panicked has started nothing more.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_process_outlives_the_thread_that_asked_for_it_and_not_the_nursery() {
        let nursery = Nursery::open().expect("a nursery");
        let mut sleeper = Command::new("sleep");
        sleeper.arg("60");
        let asked = thread::scope(|scope| scope.spawn(|| nursery.start(sleeper)).join());
        let mut child = asked.expect("no panic").expect("sleep starts");
        assert!(child.try_wait().expect("ask for its end").is_none(), "it ended with the thread that asked");
        drop(nursery);
        assert_eq!(child.wait().expect("it ends").signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn what_cannot_be_started_is_an_error_that_names_it() {
        let nursery = Nursery::open().expect("a nursery");
        let error = nursery.start(Command::new("/nowhere/etcd")).expect_err("there is no such program");
        assert!(format!("{error:#}").contains("start `/nowhere/etcd`"), "{error:#}");
    }
}
