//! A watched folder of manifests ([C.11]): what of it to read, and when. What the texts mean is for `folder`.
//!
//! A file is read when a writer has closed it, or when it was renamed into the folder, so that half a file is never
//! taken for a whole one. A folder laid out as the kubelet lays out ConfigMap volumes (files that lead through the
//! symbolic link `..data`) is read again as a whole when that link is swapped. Files whose name begins with a dot, or
//! does not end in `.yaml`, `.yml` or `.json`, and folders inside the folder are not read.
//!
//! If the folder itself goes away, the last state stays ([D.3]) until it is there again. One that takes its place and is
//! empty (a volume that is not mounted leaves such a folder behind) says as little; with the first manifest in it, what
//! is there counts. What could not be read, for want of a descriptor or by an error of the disk, is read again soon.
//!
//! Not noticed: a change behind a symbolic link that leads out of the folder (other than through `..data`), or of one
//! that the folder's own path goes through. After inotify's queue overflowed, every file that changed is read at once,
//! finished or not; the close of an unfinished one has it read again.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use super::{
    Problem, View,
    folder::{Content, Folder},
};

/// Largest file that is read, in bytes: some ten thousand pods.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Quiet after an event before anything is read: one `kubectl`-like save, or one copy of many files, is one view.
const DEBOUNCE: Duration = Duration::from_millis(10);

/// Longest time that events in a row put off reading.
const MAX_DELAY: Duration = Duration::from_millis(500);

/// How often a folder that went away is looked for.
const MISSING_POLL: Duration = Duration::from_millis(250);

/// When what could not be read is tried again: nothing need happen to a file for it to become readable.
const AGAIN: Duration = Duration::from_secs(1);

/// What to watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The folder.
    pub path: PathBuf,
    /// Namespace of ConfigMap `istio`, the mesh configuration; `istio-system` where not set otherwise.
    pub system_namespace: String,
}

/// Reads the folder once and returns what it holds; the future keeps the receiver up to date for as long as it is
/// polled, and ends when every receiver is gone. Dropping the future ends it as well.
///
/// The first view is the whole folder ([D.2]). Blocks for as long as reading it takes, and must be called within a
/// tokio runtime that has I/O and time.
///
/// # Errors
/// If the folder is not there, is not a folder, cannot be read or cannot be watched. The future fails only if inotify
/// itself does.
pub fn watch(
    config: Config,
) -> anyhow::Result<(watch::Receiver<std::sync::Arc<View>>, impl Future<Output = anyhow::Result<()>> + Send + use<>)> {
    let inotify = Inotify::init().context("inotify_init for the manifests folder (fs.inotify.max_user_instances?)")?;
    let mut watcher = Watcher {
        folder: Folder::new(&config.system_namespace),
        stamps: BTreeMap::new(),
        logged: BTreeSet::new(),
        path: config.path,
        replaced: false,
        again: Wanted::default(),
    };
    let path = watcher.path.clone();
    // Watched before it is read, so that nothing falls between.
    let descriptor = add(&mut inotify.watches(), &path)?;
    let found = watcher.all().with_context(|| format!("read the manifests folder {}", path.display()))?;
    let view = watcher.update(found, None);
    let (sender, receiver) = watch::channel(std::sync::Arc::new(view));
    let stream = inotify.into_event_stream(vec![0; 64 << 10]).context("poll inotify")?;
    Ok((receiver, watcher.run(stream, Some(descriptor), sender)))
}

fn add(watches: &mut inotify::Watches, path: &Path) -> anyhow::Result<WatchDescriptor> {
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    watches
        .add(path, mask)
        .with_context(|| format!("watch the manifests folder {}; create it, or name another one", path.display()))
}

/// Which file, and which version of it: enough to notice that it was written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

struct Watcher {
    path: PathBuf,
    folder: Folder,
    /// Of the files that were read, or could not be.
    stamps: BTreeMap<String, Stamp>,
    logged: BTreeSet<String>,
    /// The folder may be another one than the one that was read last.
    replaced: bool,
    /// What could not be read.
    again: Wanted,
}

/// What the events since the last reading ask for.
#[derive(Default)]
struct Wanted {
    files: BTreeSet<String>,
    /// Look at all files, and read those that changed.
    everything: bool,
    /// The folder itself may be another one, or none.
    folder: bool,
}

impl Wanted {
    fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.everything && !self.folder
    }

    fn join(&mut self, mut other: Self) {
        self.files.append(&mut other.files);
        self.everything |= other.everything;
        self.folder |= other.folder;
    }
}

impl Watcher {
    async fn run(
        mut self,
        mut stream: EventStream<Vec<u8>>,
        mut descriptor: Option<WatchDescriptor>,
        sender: watch::Sender<std::sync::Arc<View>>,
    ) -> anyhow::Result<()> {
        let mut wanted = Wanted::default();
        // When the first event that waits came, and when the last one did.
        let mut since: Option<(Instant, Instant)> = None;
        let mut again_at = (!self.again.is_empty()).then(|| Instant::now() + AGAIN);
        loop {
            let due = match (since, &descriptor) {
                (Some((first, last)), _) => Some((last + DEBOUNCE).min(first + MAX_DELAY)),
                (None, None) => Some(Instant::now() + MISSING_POLL),
                (None, Some(_)) => again_at,
            };
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sender.closed() => return Ok(()),
                event = stream.next() => {
                    let event = event.context("inotify ended")?.context("read inotify")?;
                    if self.note(&event, descriptor.as_ref(), &mut wanted) {
                        let now = Instant::now();
                        since = Some((since.map_or(now, |(first, _)| first), now));
                    }
                    continue;
                }
                () = timer => {}
            }
            since = None;
            if wanted.folder || descriptor.is_none() {
                if let Some(old) = descriptor.take() {
                    // It may be gone already, and its watch with it.
                    let _ = stream.watches().remove(old);
                }
                let missing = !wanted.folder;
                descriptor = add(&mut stream.watches(), &self.path).ok();
                wanted.everything = true;
                if missing && descriptor.is_some() {
                    // It is back: whoever made it gets the time to fill it.
                    wanted.folder = true;
                    since = Some((Instant::now(), Instant::now()));
                    continue;
                }
            }
            if descriptor.is_none() && !std::mem::take(&mut wanted.folder) {
                continue;
            }
            let mut asked = std::mem::take(&mut wanted);
            asked.join(std::mem::take(&mut self.again));
            // Reading and decoding may take long; the runtime's thread has other work.
            let (watcher, view) = tokio::task::spawn_blocking(move || {
                let mut watcher = self;
                let view = watcher.look(&asked);
                (watcher, view)
            })
            .await
            .context("read the manifests folder")?;
            self = watcher;
            again_at = (!self.again.is_empty()).then(|| Instant::now() + AGAIN);
            sender.send_if_modified(|current| {
                let changed = **current != view;
                if changed {
                    *current = std::sync::Arc::new(view);
                }
                changed
            });
        }
    }

    /// Whether the event asks for anything.
    fn note(
        &self,
        event: &inotify::Event<std::ffi::OsString>,
        descriptor: Option<&WatchDescriptor>,
        wanted: &mut Wanted,
    ) -> bool {
        let mask = event.mask;
        if mask.contains(EventMask::Q_OVERFLOW) {
            warn!("inotify's queue overflowed; reading the manifests folder again");
            wanted.everything = true;
            return true;
        }
        if descriptor != Some(&event.wd) {
            // Left over from a watch that was removed.
            return false;
        }
        if mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT) {
            wanted.folder = true;
            return true;
        }
        let Some(name) = event.name.as_deref() else { return false };
        if name == "..data" {
            wanted.everything = true;
            return true;
        }
        let Some(name) = manifest_name(name) else { return false };
        let path = self.path.join(&name);
        let relevant = if mask.contains(EventMask::CREATE) {
            // A regular file is read when its writer closes it; a link has no writer.
            fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink() || meta.is_file() && meta.nlink() > 1)
        } else if mask.contains(EventMask::ATTRIB) {
            // Permissions may have made it readable. The content of a file being written is not looked at.
            !self.stamps.contains_key(&name)
                && fs::File::open(&path).is_ok()
                && self.folder.names().any(|known| known == name)
        } else {
            true
        };
        if relevant {
            wanted.files.insert(name);
        }
        relevant
    }

    fn look(&mut self, wanted: &Wanted) -> View {
        if wanted.is_empty() {
            return self.update(Vec::new(), None);
        }
        self.replaced |= wanted.folder;
        let found = if wanted.everything || self.replaced {
            self.all()
        } else if self.path.is_dir() {
            Ok(wanted.files.iter().map(|name| (name.clone(), self.read(name))).collect())
        } else {
            Err(io::Error::from(io::ErrorKind::NotFound))
        };
        match found {
            Ok(found) => self.update(found, None),
            Err(error) => {
                // A folder that is gone is looked for elsewhere.
                self.again.everything = error.kind() != io::ErrorKind::NotFound;
                let message =
                    format!("cannot be read: {error}; create it again (the objects that it gave before stay in force)");
                let file = Some(self.path.display().to_string());
                self.update(Vec::new(), Some(Problem { file, document: None, line: None, object: None, message }))
            }
        }
    }

    /// Every file that changed since it was last read, or is gone.
    fn all(&mut self) -> io::Result<Vec<(String, Content)>> {
        let mut present = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            if let Some(name) = manifest_name(&entry?.file_name()) {
                present.insert(name);
            }
        }
        if self.replaced && present.is_empty() && self.folder.names().next().is_some() {
            return Err(io::Error::other("another folder has taken its place, without a manifest in it"));
        }
        self.replaced = false;
        let names: BTreeSet<String> =
            present.iter().map(String::as_str).chain(self.folder.names()).map(str::to_owned).collect();
        let mut found = Vec::new();
        for name in names {
            let stamp = fs::metadata(self.path.join(&name)).ok().map(|meta| stamp(&meta));
            if stamp.is_none() || stamp != self.stamps.get(&name).copied() {
                let content = self.read(&name);
                found.push((name, content));
            }
        }
        Ok(found)
    }

    fn read(&mut self, name: &str) -> Content {
        self.stamps.remove(name);
        match read_bounded(&self.path.join(name)) {
            Ok(Some((text, stamp))) => {
                self.stamps.insert(name.to_owned(), stamp);
                Content::Text(text)
            }
            Ok(None) => Content::Gone,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Content::Gone,
            Err(error) => {
                // An error of the system, and not about what is in the file.
                if error.raw_os_error().is_some() {
                    self.again.files.insert(name.to_owned());
                }
                Content::Unreadable(format!("cannot be read: {error}"))
            }
        }
    }

    /// The folder with this news, and what is wrong with it itself; says what is new.
    fn update(&mut self, found: Vec<(String, Content)>, problem: Option<Problem>) -> View {
        let files = found.iter().filter(|(_, content)| !matches!(content, Content::Unreadable(_))).count();
        let mut view = self.folder.update(found);
        view.problems.extend(problem);
        let lines: Vec<String> = view.problems.iter().map(ToString::to_string).collect();
        let notices = view.notices.iter().map(|notice| format!("manifests: {notice}"));
        let lines: BTreeSet<String> = lines.into_iter().chain(notices).collect();
        // A problem that was mended and comes again is news again.
        self.logged.retain(|line| lines.contains(line));
        lines.iter().for_each(|line| self.log(line));
        if files > 0 {
            let cluster = &view.cluster;
            info!(
                files,
                pods = cluster.pods.len(),
                services = cluster.services.len(),
                peer_authentications = cluster.peer_authentications.len(),
                authorization_policies = cluster.authorization_policies.len(),
                problems = view.problems.len(),
                "manifests read"
            );
        }
        view
    }

    fn log(&mut self, line: &str) {
        if self.logged.insert(line.to_owned()) {
            warn!("{line}");
        }
    }
}

/// The name, if it is one of a manifest.
pub(super) fn manifest_name(name: &OsStr) -> Option<String> {
    let name = name.to_str()?;
    let manifest = !name.starts_with('.') && [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end));
    manifest.then(|| name.to_owned())
}

fn stamp(meta: &fs::Metadata) -> Stamp {
    Stamp { device: meta.dev(), inode: meta.ino(), size: meta.size(), changed: (meta.ctime(), meta.ctime_nsec()) }
}

/// `None` for what is not a file.
pub(super) fn read_bounded(path: &Path) -> io::Result<Option<(String, Stamp)>> {
    // Looked at before it is opened: opening a FIFO would wait for a writer.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let file = fs::File::open(path)?;
    let meta = file.metadata()?;
    let too_large = || io::Error::other(format!("larger than {} MiB; split it", MAX_FILE_BYTES >> 20));
    if meta.size() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let mut text = Vec::with_capacity(usize::try_from(meta.size()).unwrap_or(0) + 1);
    io::Read::read_to_end(&mut io::Read::take(file, MAX_FILE_BYTES + 1), &mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let text = String::from_utf8(text).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        io::Error::new(io::ErrorKind::InvalidData, format!("line {line} is not UTF-8 text"))
    })?;
    Ok(Some((text, stamp(&meta))))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test awaits what it has started, or ends with it")]
mod tests;
