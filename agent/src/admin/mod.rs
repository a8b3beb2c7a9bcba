//! What an operator can ask a running agent: everything that it believes, its open connections, why one was refused,
//! what can go to STRICT, its log level.
//!
//! It reads; the one thing that it changes is the log level. What a node's processes may ask is answered on the loopback
//! interface of the node ([`http`]), so a pod cannot ask, except a hostNetwork pod, which is a process of the node.
//! Everything runs on a thread of its own, so that a large answer never holds up the sign of life, and so that readiness
//! can say what is missing while the agent is still starting.

use std::{borrow::Cow, collections::BTreeMap, path::PathBuf, sync::Arc, thread, time::Duration};

use anyhow::Context as _;
use tokio::sync::{oneshot, watch};

use crate::{
    config, enroll,
    identity::Identities,
    listen::NodePort,
    model::PodUid,
    pods,
    policy::{self, Snapshot},
    source::View,
    telemetry::{
        LogLevel, open,
        readiness::{self, Ready},
    },
};

pub mod dump;
pub mod http;
pub mod process;
pub mod strict;
pub mod why;

/// What there is to read once the agent has started.
pub struct Handles {
    /// Name of this node.
    pub node_name: String,
    /// Seconds since the epoch.
    pub started_at: u64,
    /// The policy in force.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// What the source says.
    pub views: watch::Receiver<Arc<View>>,
    /// The pods that run here.
    pub nodes: watch::Receiver<Arc<pods::Node>>,
    /// Where each of them stands.
    pub enrolled: watch::Receiver<Arc<BTreeMap<PodUid, enroll::State>>>,
    /// The open connections.
    pub connections: open::Connections,
    /// The certificates.
    pub identities: Identities,
    /// What readiness waits for.
    pub ready: Ready,
    /// What the operator configured that changes the meaning of the cluster's objects.
    pub options: policy::Options,
    /// Where the maps are pinned.
    pub pin_dir: PathBuf,
    /// The agent's settings.
    pub settings: watch::Receiver<Arc<BTreeMap<&'static str, config::Given>>>,
}

/// How long answers that are under way may take when the agent ends.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Where to answer.
pub struct Ports {
    /// Operators; an address of the loopback interface.
    pub admin: NodePort,
    /// The kubelet, and whoever else wants to know whether the agent is ready.
    pub readiness: NodePort,
}

/// The thread that answers. It ends when this is dropped, or [`Server::stop`]ped.
pub struct Server {
    handles: watch::Sender<Option<Arc<Handles>>>,
    failed: Option<oneshot::Receiver<anyhow::Error>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Answers from when `answers` is true until `relieved` resolves: readiness at once, the rest after
    /// [`Server::publish`].
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        ports: Ports,
        mut answers: watch::Receiver<bool>,
        relieved: impl Future<Output = ()> + Send + 'static,
        ready: Ready,
        level: LogLevel,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("build the runtime of the admin thread")?;
        let (handles, published) = watch::channel(None);
        let (stop, stopped) = oneshot::channel::<()>();
        let (report, failed) = oneshot::channel();
        let body = async move {
            // When this is dropped, or whoever asks is answered by the successor.
            let stopped = futures_util::FutureExt::shared(async move {
                tokio::select! {
                    _ = stopped => {}
                    () = relieved => {}
                }
            });
            let answering = tokio::select! {
                () = stopped.clone() => false,
                answering = answers.wait_for(|answers| *answers) => answering.is_ok(),
            };
            if answering {
                let (admin, answering) = (ports.admin.listen()?, ports.readiness.listen()?);
                let state = http::State::new(published, ready.clone(), level);
                let serving = http::serve(admin, state, stopped.clone());
                let answering = readiness::serve(answering, ready, stopped.clone());
                let both = async {
                    tokio::try_join!(async { serving.await.context("the admin server has ended") }, async {
                        answering.await.context("the readiness server has ended")
                    },)
                };
                tokio::select! {
                    result = both => drop(result?),
                    () = async {
                        stopped.await;
                        tokio::time::sleep(LAST_WORDS).await;
                    } => {}
                }
            }
            anyhow::Ok(())
        };
        let thread = thread::Builder::new()
            .name("admin".into())
            .spawn(move || {
                if let Err(error) = runtime.block_on(body) {
                    // If nobody waits for it any more, the agent is ending.
                    let _ = report.send(error);
                }
                runtime.shutdown_timeout(LAST_WORDS);
            })
            .context("start the admin thread")?;
        Ok(Self { handles, failed: Some(failed), stop: Some(stop), thread: Some(thread) })
    }

    /// Makes everything readable: the agent has started.
    pub fn publish(&self, handles: Handles) {
        self.handles.send_replace(Some(Arc::new(handles)));
    }

    /// Resolves with why answering has ended, if it does although nobody stopped it.
    pub fn failed(&mut self) -> impl Future<Output = anyhow::Error> + use<> {
        let failed = self.failed.take();
        async move {
            match failed {
                Some(failed) => match failed.await {
                    Ok(error) => error,
                    // It was relieved, or stopped.
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        }
    }

    /// Closes the ports, waits for the answers that are under way, and for the thread.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the admin thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.join();
    }
}

/// `text` with everything escaped that a terminal would obey, or that would make it look like another text: control
/// characters, and the marks that change the direction of writing. Line feeds are among them.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_dangerous) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match is_dangerous(c) {
            true => safe.extend(c.escape_unicode()),
            false => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

/// As [`printable`], in JSON or in YAML's double quotes, where such characters occur within texts only; line feeds
/// between them stay.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    let dangerous = |c: char| c != '\n' && is_dangerous(c);
    if !json.contains(dangerous) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 8);
    for c in json.chars() {
        match dangerous(c) {
            // All of them are in the basic plane: one unit.
            true => safe.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{61c}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_shown_instead() {
        assert_eq!(printable("plain – text"), "plain – text");
        assert_eq!(printable("\u{1b}[2Ja\nb\u{9b}1m"), "\\u{1b}[2Ja\\u{a}b\\u{9b}1m");
        assert_eq!(printable("user\u{202e}txt.exe"), "user\\u{202e}txt.exe");
        let text = serde_json::to_string_pretty(&serde_json::json!({"a": "\u{9b}\u{7f}\u{202e}\u{1b}"})).expect("JSON");
        let safe = printable_json(&text);
        assert!(!safe.contains(|c| c != '\n' && is_dangerous(c)), "{safe}");
        let same: serde_json::Value = serde_json::from_str(&safe).expect("JSON");
        assert_eq!(same["a"], "\u{9b}\u{7f}\u{202e}\u{1b}");
    }
}
