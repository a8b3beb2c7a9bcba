//! The watched folder on a real file system with real inotify.

use std::{
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    sync::Arc,
};

use super::*;
use crate::model::{MtlsMode, ObjectRef};

struct Watched {
    dir: tempfile::TempDir,
    views: watch::Receiver<Arc<View>>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for an event to have been acted on.
const QUIET: Duration = Duration::from_millis(300);

fn policy(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: test}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

fn mode(view: &View) -> Option<MtlsMode> {
    view.cluster.peer_authentications.get(&ObjectRef::new("test", "p")).map(|policy| policy.mode)
}

impl Watched {
    fn start(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("manifests");
        fs::create_dir(&path).expect("mkdir");
        prepare(&path);
        let (views, run) = watch(Config { path, system_namespace: "istio-system".into() }).expect("watch");
        Self { dir, views, task: tokio::spawn(run) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("manifests").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("write");
    }

    async fn until(&mut self, what: &str, good: impl FnMut(&Arc<View>) -> bool) -> Arc<View> {
        if let Ok(view) = tokio::time::timeout(PATIENCE, self.views.wait_for(good)).await {
            return view.expect("the watcher runs").clone();
        }
        panic!("{what}: still {:?}", self.views.borrow());
    }

    async fn until_mode(&mut self, expected: Option<MtlsMode>) {
        self.until(&format!("{expected:?}"), |view| mode(view) == expected && view.problems.is_empty()).await;
    }

    /// Nothing new comes.
    async fn quiet(&mut self) {
        self.views.borrow_and_update();
        let changed = tokio::time::timeout(QUIET, self.views.changed()).await;
        assert!(changed.is_err(), "a view that nobody asked for: {:?}", self.views.borrow());
    }

    async fn stop(self) {
        drop(self.views);
        let end = tokio::time::timeout(PATIENCE, self.task).await;
        end.expect("ends with its last receiver").expect("no panic").expect("no error");
    }
}

/// [D.2]
#[tokio::test]
async fn the_first_view_is_the_whole_folder() {
    let mut watched = Watched::start(|path| {
        fs::write(path.join("p.yaml"), policy("STRICT")).expect("write");
        fs::write(path.join(".hidden.yaml"), "a: [").expect("write");
        fs::write(path.join("README.md"), "a: [").expect("write");
        fs::create_dir(path.join("folder.yaml")).expect("mkdir");
    });
    let first = watched.views.borrow_and_update().clone();
    assert_eq!((mode(&first), first.problems.len()), (Some(MtlsMode::Strict), 0));
    watched.quiet().await;
    watched.stop().await;
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_an_error_at_start() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("write");
    for path in [dir.path().join("nothing"), file] {
        let error = watch(Config { path, system_namespace: "istio-system".into() }).err().expect("an error");
        assert!(error.to_string().contains("create it, or name another one"), "{error:#}");
    }
}

/// [C.11]: written, renamed into place, removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_followed() {
    let mut watched = Watched::start(|_| {});
    watched.write("p.yaml", &policy("STRICT"));
    watched.until_mode(Some(MtlsMode::Strict)).await;
    watched.write(".p.yaml.swp", &policy("DISABLE"));
    fs::rename(watched.path(".p.yaml.swp"), watched.path("p.yaml")).expect("rename");
    watched.until_mode(Some(MtlsMode::Disable)).await;
    fs::rename(watched.path("p.yaml"), watched.path("p.yaml.off")).expect("rename");
    watched.until_mode(None).await;
    watched.write("q.json", &policy("STRICT"));
    watched.until_mode(Some(MtlsMode::Strict)).await;
    fs::hard_link(watched.path("p.yaml.off"), watched.path("a.yml")).expect("link");
    watched.until("the link", |view| mode(view) == Some(MtlsMode::Disable)).await;
    fs::remove_file(watched.path("q.json")).expect("unlink");
    watched.until_mode(Some(MtlsMode::Disable)).await;
    fs::remove_file(watched.path("a.yml")).expect("unlink");
    watched.until_mode(None).await;
    watched.stop().await;
}

/// [C.11]: half a file, on its own and while another one changes, deletes nothing.
#[tokio::test]
async fn a_half_written_file_is_not_read() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    let text = policy("DISABLE");
    let mut file = fs::File::create(watched.path("p.yaml")).expect("truncate");
    watched.quiet().await;
    // All of it but the policy: valid YAML, so that only the time of reading saves it.
    file.write_all(b"apiVersion: v1\nkind: Namespace\nmetadata: {name: test}\n---\n").expect("write");
    file.flush().expect("flush");
    watched.write("other.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n");
    let view = watched.until("the other file", |view| view.cluster.namespaces.contains_key("other")).await;
    assert_eq!(mode(&view), Some(MtlsMode::Strict));
    file.write_all(text.as_bytes()).expect("write");
    drop(file);
    watched.until_mode(Some(MtlsMode::Disable)).await;
    watched.stop().await;
}

/// [C.6], [C.11]: errors keep what was there, and are told once.
#[tokio::test]
async fn an_error_keeps_the_previous_state() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    for (bytes, words) in [
        (policy("DISABLED").into_bytes(), "p.yaml document 1 (line 4): PeerAuthentication test/p: spec.mtls.mode"),
        (b"a: [\n".to_vec(), "p.yaml (line 2): not YAML"),
        (b"a: \xff\n".to_vec(), "p.yaml: cannot be read: line 1 is not UTF-8 text"),
    ] {
        fs::write(watched.path("p.yaml"), bytes).expect("write");
        let told = |view: &Arc<View>| view.problems.iter().any(|problem| problem.to_string().starts_with(words));
        let view = watched.until(words, told).await;
        assert_eq!((mode(&view), view.problems.len()), (Some(MtlsMode::Strict), 1), "{:?}", view.problems);
    }
    watched.write("p.yaml", &policy("PERMISSIVE"));
    watched.until_mode(Some(MtlsMode::Permissive)).await;
    watched.stop().await;
}

/// A FIFO would block the reader, a link to nothing is not there, and permissions can be mended.
#[tokio::test]
async fn odd_entries_do_no_harm() {
    let mut watched = Watched::start(|path| {
        nix::unistd::mkfifo(&path.join("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
        symlink("nowhere", path.join("dangling.yaml")).expect("symlink");
        symlink("loop.yaml", path.join("loop.yaml")).expect("symlink");
        fs::write(path.join("p.yaml"), policy("STRICT")).expect("write");
    });
    let first = watched.views.borrow_and_update().clone();
    assert_eq!(mode(&first), Some(MtlsMode::Strict));
    assert!(first.problems.iter().all(|problem| problem.file.as_deref() == Some("loop.yaml")), "{:?}", first.problems);
    fs::set_permissions(watched.path("p.yaml"), fs::Permissions::from_mode(0o600)).expect("chmod");
    watched.quiet().await;
    watched.stop().await;
}

/// The layout of a ConfigMap volume: one rename swaps every file.
#[tokio::test]
async fn a_swapped_data_link_is_followed() {
    let fill = |path: &Path, version: &str, mode: &str| {
        fs::create_dir(path.join(version)).expect("mkdir");
        fs::write(path.join(version).join("p.yaml"), policy(mode)).expect("write");
        symlink(version, path.join("..data_tmp")).expect("symlink");
        fs::rename(path.join("..data_tmp"), path.join("..data")).expect("rename");
    };
    let mut watched = Watched::start(|path| {
        fill(path, "..2024_1", "STRICT");
        symlink("..data/p.yaml", path.join("p.yaml")).expect("symlink");
    });
    watched.until_mode(Some(MtlsMode::Strict)).await;
    fill(&watched.path(""), "..2024_2", "DISABLE");
    fs::remove_dir_all(watched.path("..2024_1")).expect("rmdir");
    watched.until_mode(Some(MtlsMode::Disable)).await;
    // A key that is added later: its link comes after the swap.
    fs::write(watched.path("..2024_2/n.yaml"), "apiVersion: v1\nkind: Namespace\nmetadata: {name: late}\n")
        .expect("write");
    symlink("..data/n.yaml", watched.path("n.yaml")).expect("symlink");
    watched.until("the new key", |view| view.cluster.namespaces.contains_key("late")).await;
    watched.stop().await;
}

/// [D.3]: the folder goes and comes back; nothing is lost meanwhile, and what is there then counts.
#[tokio::test]
async fn a_folder_that_is_made_again_is_followed() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    for again in ["removed", "renamed"] {
        if again == "removed" {
            fs::remove_dir_all(watched.path("")).expect("rmdir");
        } else {
            fs::rename(watched.path(""), watched.dir.path().join("elsewhere")).expect("rename");
        }
        let view = watched.until(again, |view| !view.problems.is_empty()).await;
        assert_eq!(mode(&view), Some(MtlsMode::Strict), "{again}");
        assert!(view.problems[0].message.contains("create it again"), "{:?}", view.problems);
        watched.quiet().await;
        fs::create_dir(watched.path("")).expect("mkdir");
        watched.write("q.yaml", &policy("DISABLE"));
        watched.until_mode(Some(MtlsMode::Disable)).await;
        watched.write("q.yaml", &policy("STRICT"));
        watched.until_mode(Some(MtlsMode::Strict)).await;
    }
    watched.stop().await;
}

/// [D.3]: an empty folder in the place of a full one is a source that is gone, and not one that has deleted everything.
#[tokio::test]
async fn an_empty_folder_in_its_place_changes_nothing_until_it_is_filled() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    for again in 0..2 {
        fs::rename(watched.path(""), watched.dir.path().join(format!("full-{again}"))).expect("rename");
        fs::create_dir(watched.path("")).expect("mkdir");
        let told =
            |view: &Arc<View>| view.problems.iter().any(|problem| problem.message.contains("without a manifest"));
        let view = watched.until("told", told).await;
        assert_eq!(mode(&view), Some(MtlsMode::Strict));
        // What is no manifest fills nothing.
        watched.write("README", "nothing");
        watched.quiet().await;
        watched.write("q.yaml", &policy("DISABLE"));
        watched.until_mode(Some(MtlsMode::Disable)).await;
        watched.write("q.yaml", &policy("STRICT"));
        watched.until_mode(Some(MtlsMode::Strict)).await;
    }
    // In the same folder it is a deletion.
    fs::remove_file(watched.path("q.yaml")).expect("remove");
    watched.until_mode(None).await;
    watched.stop().await;
}

/// What cannot be read, for whatever reason that is not in the file, is read as soon as it can be, without an event.
#[tokio::test]
async fn what_could_not_be_read_is_read_again() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    // A link whose target is behind a loop of links, and then is not: nothing happens to the link itself.
    let (loops, target) = (watched.dir.path().join("loop"), watched.dir.path().join("target"));
    fs::create_dir(&target).expect("mkdir");
    fs::write(target.join("p.yaml"), policy("DISABLE")).expect("write");
    symlink("loop", &loops).expect("symlink");
    let fresh = watched.dir.path().join("fresh");
    symlink("../loop/p.yaml", &fresh).expect("symlink");
    fs::rename(fresh, watched.path("p.yaml")).expect("rename");
    let view = watched.until("unreadable", |view| !view.problems.is_empty()).await;
    assert_eq!(mode(&view), Some(MtlsMode::Strict), "what it gave before stays");
    watched.quiet().await;
    fs::remove_file(&loops).expect("remove");
    symlink("target", &loops).expect("symlink");
    watched.until_mode(Some(MtlsMode::Disable)).await;
    watched.stop().await;
}

/// Many files at once are few views, and none of them is lost.
#[tokio::test]
async fn a_burst_of_files_is_read_whole() {
    let mut watched = Watched::start(|_| {});
    for n in 0..300 {
        watched.write(&format!("{n}.yaml"), &format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: n-{n}}}\n"));
    }
    watched.until("300 namespaces", |view| view.cluster.namespaces.len() == 300).await;
    watched.stop().await;
}

/// A view that says the same is not published: nothing is judged again for it.
#[tokio::test]
async fn touching_a_file_publishes_nothing() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    watched.write("p.yaml", &format!("{}\n# a comment\n", policy("STRICT")));
    watched.quiet().await;
    watched.stop().await;
}

/// Operators are told the place of the moment, also where nothing but the place has changed.
#[tokio::test]
async fn a_policy_is_known_with_its_place() {
    let mut watched = Watched::start(|path| fs::write(path.join("p.yaml"), policy("STRICT")).expect("write"));
    let place =
        |view: &Arc<View>| view.policies.values().map(|place| (place.at.clone(), place.stale)).collect::<Vec<_>>();
    let at = |line, stale| [(format!("p.yaml document 1 (line {line})"), stale)];
    assert_eq!(place(&watched.views.borrow()), at(1, false));
    watched.write("p.yaml", &format!("# a comment\n{}", policy("STRICT")));
    watched.until("one line further down", |view| place(view) == at(2, false)).await;
    // [C.6]: what is in force is not what the file says now.
    watched.write("p.yaml", &policy("DISABLED"));
    watched.until("from before", |view| place(view) == at(1, true)).await;
    watched.stop().await;
}

/// inotify's queue is bounded: what happened while it was full is found by looking.
#[tokio::test]
async fn an_overflow_is_made_good() {
    let mut watched = Watched::start(|path| fs::write(path.join("gone.yaml"), policy("STRICT")).expect("write"));
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("read");
    // On this runtime's one thread, the watcher does not run before the first await. Events that equal the last one in
    // the queue are merged, so two files take turns.
    for _ in 0..=limit.trim().parse::<usize>().expect("a number") / 2 {
        watched.write("a.yaml", "");
        watched.write("b.yaml", "");
    }
    fs::remove_file(watched.path("gone.yaml")).expect("unlink");
    watched.write("late.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: late}\n");
    let seen = |view: &Arc<View>| mode(view).is_none() && view.cluster.namespaces.contains_key("late");
    watched.until("what the queue lost", seen).await;
    watched.stop().await;
}

/// A line for each new problem, and none for one that is still there.
#[test]
fn a_problem_is_logged_once() {
    #[derive(Clone, Default)]
    struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut watcher = Watcher {
        path: dir.path().to_owned(),
        folder: Folder::new("istio-system"),
        stamps: BTreeMap::new(),
        logged: BTreeSet::new(),
        replaced: false,
        again: Wanted::default(),
    };
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    let mut counts = Vec::new();
    tracing::subscriber::with_default(subscriber, || {
        for text in [&policy("DISABLED"), &policy("DISABLED"), &policy("STRICT"), &policy("DISABLED")] {
            fs::write(dir.path().join("p.yaml"), text).expect("write");
            watcher.look(&Wanted { files: ["p.yaml".to_owned()].into(), ..Wanted::default() });
            let all = lines.0.lock().expect("not poisoned");
            counts.push(String::from_utf8_lossy(&all).matches("WARN").count());
        }
    });
    assert_eq!(counts, [1, 1, 1, 2]);
}
