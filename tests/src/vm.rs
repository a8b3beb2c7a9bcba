//! Another kernel, booted under QEMU, running one script: the supported floor is tested on the kernels themselves.
//!
//! A guest has no disk. Its root is a file archive made here: busybox, the modules it asks for, the given programs with
//! their shared libraries. Its console is the result: what the script printed, and its exit status. Guests run one at a
//! time, by KVM where it works and else by translation; that a machine offers KVM does not mean that it works.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{PATIENCE_VARIABLE, command, interrupt};

/// A kernel series of Debian that is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Linux 6.1: the oldest that is supported.
    Oldest,
    /// Linux 6.12.
    Newest,
}

impl Kernel {
    /// All that are tested.
    pub const ALL: [Self; 2] = [Self::Oldest, Self::Newest];

    /// Its version, two numbers.
    pub fn series(self) -> &'static str {
        match self {
            Self::Oldest => "6.1",
            Self::Newest => "6.12",
        }
    }

    /// The release of Debian that has it.
    fn release_of_debian(self) -> &'static str {
        match self {
            Self::Oldest => "12 (bookworm)",
            Self::Newest => "12 (bookworm-security)",
        }
    }

    /// Its package, as a pattern: the exact version is Debian's newest.
    pub fn package(self) -> String {
        format!("linux-image-{}.*-cloud-amd64", self.series())
    }

    /// The unpacked kernel in `cache`, if it was fetched.
    pub fn cached(self, cache: &Path) -> Option<Unpacked> {
        let dir = cache.join(self.series());
        let release = fs::read_to_string(dir.join("release")).ok()?;
        Some(Unpacked { dir, release: release.trim().to_owned() })
    }

    /// The unpacked kernel.
    ///
    /// # Errors
    /// It was not fetched.
    pub fn unpacked(self) -> Result<Unpacked> {
        let cache = crate::cache()?.join("kernels");
        self.cached(&cache).with_context(|| {
            format!("kernel {} is not in {}: `cargo xtask setup` fetches it", self.series(), cache.display())
        })
    }

    /// Downloads the package with apt and unpacks what a guest needs into `cache`.
    ///
    /// # Errors
    /// apt does not offer it, or the download failed.
    pub fn fetch(self, cache: &Path) -> Result<Unpacked> {
        let dir = cache.join(self.series());
        let work = cache.join(format!("{}.new", self.series()));
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
        }
        fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
        let package = self.offered()?;
        let mut download = Command::new("apt-get");
        // As root, apt would otherwise download as a user who may not write here, and complain.
        download.args(["-qq", "-o", "APT::Sandbox::User=root", "download", &package]).current_dir(&work);
        command::finish(&mut download, None)?;
        let deb = fs::read_dir(&work)?.next().context("apt-get download left no file")??.path();
        let tree = work.join("tree");
        command::run("dpkg-deb", &["-x".as_ref(), deb.as_os_str(), tree.as_os_str()])?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        fs::rename(tree.join("boot").join(format!("vmlinuz-{release}")), work.join("vmlinuz"))
            .context("find vmlinuz")?;
        fs::rename(tree.join("lib/modules").join(&release).join("kernel"), work.join("modules"))
            .context("find modules")?;
        fs::remove_dir_all(&tree)?;
        fs::remove_file(&deb)?;
        fs::write(work.join("release"), &release)?;
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
        fs::rename(&work, &dir).with_context(|| format!("rename {}", work.display()))?;
        Ok(Unpacked { dir, release })
    }

    /// The newest package that apt offers.
    ///
    /// # Errors
    /// It offers none; the error says what must be added to its sources.
    pub fn offered(self) -> Result<String> {
        let pattern = format!("^linux-image-{}\\.[^-]*(-[0-9]+)?-cloud-amd64$", self.series().replace('.', "\\."));
        let found = command::run("apt-cache", &["search", "--names-only", &pattern])?;
        let names = found.lines().filter_map(|l| l.split(' ').next());
        names.max_by_key(|name| numbers(name)).map(str::to_owned).with_context(|| {
            format!(
                "apt offers no {}, which the tests boot: put the sources of Debian {} into /etc/apt and run `apt-get update`",
                self.package(),
                self.release_of_debian()
            )
        })
    }
}

/// The numbers in a name, so that 6.1.0-9 comes before 6.1.0-56.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// A kernel on this machine's disk.
#[derive(Debug, Clone)]
pub struct Unpacked {
    dir: PathBuf,
    /// What `uname -r` says.
    pub release: String,
}

/// What runs in the guest.
#[derive(Debug, Clone)]
pub struct Guest {
    script: String,
    modules: Vec<String>,
    /// By the path in the guest.
    files: BTreeMap<String, Carried>,
    memory_mib: u32,
    limit: Duration,
}

/// A file that a guest gets.
#[derive(Debug, Clone)]
struct Carried {
    here: PathBuf,
    /// Without its debugging information: the guest's root is its memory.
    stripped: bool,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report {
    /// Exit status of the script.
    pub status: i32,
    /// What the script and its programs printed.
    pub output: String,
    /// What ran the guest's code.
    pub accelerator: Accelerator,
    /// From QEMU's start to the script's.
    pub booted: Duration,
    /// From QEMU's start to its end.
    pub took: Duration,
}

/// What runs a guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor, by KVM.
    Kvm,
    /// QEMU, by translation: some ten times slower, and still right.
    Translation,
}

impl Accelerator {
    /// QEMU's name, and the one that [`ACCELERATOR_VARIABLE`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Translation => "tcg",
        }
    }

    fn processor(self) -> &'static str {
        match self {
            // A machine that is itself a guest may announce this one and refuse to have it set, on which QEMU aborts.
            Self::Kvm => "max,arch-capabilities=off",
            Self::Translation => "max",
        }
    }

    /// How often its time fits into a guest's limit.
    fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Translation => 6,
        }
    }

    /// Those to try, in order.
    fn candidates(kvm_fails: bool) -> Result<Vec<Self>> {
        match std::env::var(ACCELERATOR_VARIABLE).as_deref() {
            Ok("kvm") => Ok(vec![Self::Kvm]),
            Ok("tcg") => Ok(vec![Self::Translation]),
            Ok(other) => bail!("{ACCELERATOR_VARIABLE} is {other:?}: it may be kvm or tcg, or absent for what works"),
            Err(_) if kvm_fails || !Path::new("/dev/kvm").exists() => Ok(vec![Self::Translation]),
            Err(_) => Ok(vec![Self::Kvm, Self::Translation]),
        }
    }
}

/// Set to `kvm` or `tcg`, allows only that [`Accelerator`].
pub const ACCELERATOR_VARIABLE: &str = "CULVERT_VM_ACCELERATOR";

/// How long a guest under KVM may take until its kernel says anything. A fraction of a second is usual; inside another
/// virtual machine KVM may be there and need minutes.
const KVM_FIRST_WORD: Duration = Duration::from_secs(10);

/// How often a guest is booted whose kernel ends before the script begins. Under translation with two processors, about one
/// boot in eight of some kernels ends in an Oops where the kernel rewrites its own text; the kernel itself is not to blame.
const BOOTS: usize = 3;

/// Held while a guest runs, since each takes two processors; true once KVM was seen not to work.
static KVM_FAILS: Mutex<bool> = Mutex::new(false);

/// How QEMU ended.
enum Ended {
    /// It ran the guest, which has something to say.
    Ran(Report),
    /// The guest never came to life, and why.
    Stillborn(String),
    /// Its kernel began to boot and ended before the script; the end of its console.
    Broken(String),
}

impl Guest {
    /// A guest that runs `script` with busybox's shell, as root, with `/proc`, `/sys`, `/dev`, `/run`, `/tmp`, cgroup2 and the
    /// BPF file system mounted and the loopback device up.
    pub fn new(script: &str) -> Self {
        Self {
            script: script.to_owned(),
            modules: Vec::new(),
            files: BTreeMap::new(),
            memory_mib: 1024,
            limit: Duration::from_secs(180),
        }
    }

    /// With a module, and those it depends on, loaded before the script runs. One that is built in is no error.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// With another limit than three minutes, from start to end; under translation it is longer.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// With a program of the system, found on PATH.
    ///
    /// # Errors
    /// It is not there, or `ldd` failed.
    pub fn tool(self, name: &str) -> Result<Self> {
        let here = command::find(name)?;
        self.program(name, &here)
    }

    /// With a program of this machine in `/bin` under `name`, and the shared libraries it needs where it looks for them.
    ///
    /// # Errors
    /// `ldd` failed.
    pub fn program(mut self, name: &str, here: &Path) -> Result<Self> {
        self.files.insert(format!("/bin/{name}"), Carried { here: here.to_owned(), stripped: true });
        let listed = match command::run("ldd", &[here]) {
            Ok(listed) => listed,
            Err(error) if format!("{error:#}").contains("not a dynamic executable") => return Ok(self),
            Err(error) => return Err(error),
        };
        for line in listed.lines() {
            if line.contains("not found") {
                bail!("{}: {}", here.display(), line.trim());
            }
            let path = line.split("=>").last().unwrap_or(line).trim().split(' ').next().unwrap_or("");
            if path.starts_with('/') {
                self.files.insert(path.to_owned(), Carried { here: path.into(), stripped: false });
            }
        }
        Ok(self)
    }

    /// Boots `kernel`, runs the script, and returns when the guest has switched itself off.
    ///
    /// # Errors
    /// QEMU could not be run, the guest did not end in time, or it ended without a status; the error shows the end of its
    /// console.
    pub fn boot(&self, kernel: &Unpacked) -> Result<Report> {
        let mut kvm_fails = KVM_FAILS.lock().unwrap_or_else(PoisonError::into_inner);
        let work = std::env::temp_dir().join(format!("culvert-vm-{}-{}", std::process::id(), kernel.release));
        fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
        let report = self.boot_in(kernel, &work, &mut kvm_fails);
        fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
        report
    }

    fn boot_in(&self, kernel: &Unpacked, work: &Path, kvm_fails: &mut bool) -> Result<Report> {
        self.archive(kernel, work, &work.join(ROOT)).context("make the guest's root")?;
        let mut reasons = Vec::new();
        for accelerator in Accelerator::candidates(*kvm_fails)? {
            for _ in 0..BOOTS {
                match self.run(kernel, work, accelerator)? {
                    Ended::Ran(report) => return Ok(report),
                    Ended::Stillborn(why) => {
                        let reason = format!("the guest does not come up under {}: {why}", accelerator.name());
                        eprintln!("{}: {reason}", kernel.release);
                        reasons.push(reason);
                        *kvm_fails |= accelerator == Accelerator::Kvm;
                        break;
                    }
                    Ended::Broken(console) => {
                        let reason = format!("the guest ended before the script began:\n{console}");
                        eprintln!("{}: {reason}", kernel.release);
                        reasons.push(reason);
                    }
                }
            }
        }
        bail!("{}", reasons.join("\n"))
    }

    fn run(&self, kernel: &Unpacked, work: &Path, accelerator: Accelerator) -> Result<Ended> {
        let console = work.join("console");
        let begun = Instant::now();
        let mut qemu = self.qemu(kernel, work, accelerator, &console)?;
        let watched = self.watch(&mut qemu, begun, accelerator, &console);
        let text = read_lossy(&console).replace('\r', "");
        let (status, booted) = match watched {
            Ok(watched) => watched,
            Err(why) => {
                qemu.kill().context("end QEMU")?;
                qemu.wait().context("wait for QEMU")?;
                interrupt::check()?;
                if text.is_empty() {
                    return Ok(Ended::Stillborn(why.to_string()));
                }
                bail!("the guest was {why}; the end of its console:\n{}", tail(&text));
            }
        };
        if text.is_empty() {
            let said = read_lossy(&work.join("qemu"));
            return Ok(Ended::Stillborn(format!("QEMU ended with {status}: {}", said.trim())));
        }
        let Some((_, output)) = text.split_once(BEGIN) else { return Ok(Ended::Broken(tail(&text))) };
        let (output, rest) =
            output.rsplit_once(END).with_context(|| format!("the guest ended without a status:\n{}", tail(&text)))?;
        let status = rest.trim().lines().next().unwrap_or("").parse().context("the guest's status")?;
        let took = begun.elapsed();
        let booted = booted.unwrap_or(took);
        Ok(Ended::Ran(Report { status, output: output.trim().to_owned(), accelerator, booted, took }))
    }

    fn qemu(&self, kernel: &Unpacked, work: &Path, accelerator: Accelerator, console: &Path) -> Result<Child> {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-smp", "2"])
            .args(["-accel", accelerator.name(), "-cpu", accelerator.processor()])
            .args(["-m", &self.memory_mib.to_string()])
            // Nobody attacks this guest, and under translation each remedy costs as much as the disease.
            .arg("-append")
            // What the kernel does not know becomes the first process's environment.
            .arg(format!(
                "console=ttyS0 panic=-1 mitigations=off rdinit=/init {PATIENCE_VARIABLE}={}",
                accelerator.patience()
            ))
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(kernel.dir.join("vmlinuz"))
            .arg("-initrd")
            .arg(work.join(ROOT))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(work.join("qemu")).context("create QEMU's log")?)
            .process_group(0);
        // SAFETY: prctl(2) is async-signal-safe; the thread whose end is meant is this one, which waits for QEMU.
        unsafe {
            qemu.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        fs::write(console, "").context("empty the console")?;
        qemu.spawn().context("start qemu-system-x86_64")
    }

    /// Waits for QEMU's end; its status, and when the script began.
    ///
    /// # Errors
    /// Why it must be ended, QEMU still running.
    fn watch(
        &self,
        qemu: &mut Child,
        begun: Instant,
        accelerator: Accelerator,
        console: &Path,
    ) -> Result<(ExitStatus, Option<Duration>)> {
        let limit = self.limit * accelerator.patience();
        let mut booted = None;
        loop {
            if let Some(status) = qemu.try_wait().context("wait for QEMU")? {
                return Ok((status, booted));
            }
            if booted.is_none() {
                let text = read_lossy(console);
                booted = text.contains(BEGIN).then(|| begun.elapsed());
                if text.is_empty() && accelerator == Accelerator::Kvm && begun.elapsed() > KVM_FIRST_WORD {
                    bail!("silent for {} s", KVM_FIRST_WORD.as_secs());
                }
            }
            if begun.elapsed() > limit {
                bail!("still running after {} s", limit.as_secs());
            }
            if interrupt::requested() {
                bail!("interrupted");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn archive(&self, kernel: &Unpacked, work: &Path, to: &Path) -> Result<()> {
        let modules = kernel.with_dependencies(&self.modules)?;
        let mut archive = Archive::new(BufWriter::new(File::create(to)?))?;
        archive.file(
            "bin/busybox",
            0o755,
            &fs::read("/bin/busybox").context("read /bin/busybox (package busybox-static)")?,
        )?;
        archive.file("init", 0o755, self.init(&modules).as_bytes())?;
        archive.file("script", 0o755, self.script.as_bytes())?;
        for module in &modules {
            archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.bytes(work)?)?;
        }
        for (there, file) in &self.files {
            let here = &file.here;
            let mode =
                fs::metadata(here).with_context(|| format!("look at {}", here.display()))?.permissions().mode() & 0o777;
            let bytes = file.bytes(work).with_context(|| format!("read {}", here.display()))?;
            archive.file(there.trim_start_matches('/'), mode, &bytes)?;
        }
        archive.end()?;
        Ok(())
    }

    fn init(&self, modules: &[Module]) -> String {
        let load: String =
            modules.iter().map(|m| format!("insmod /modules/{}.ko || echo 'no {}'\n", m.name, m.name)).collect();
        format!(
            "#!/bin/busybox sh\n\
             /bin/busybox --install -s /bin\n\
             export PATH=/bin HOME=/ RUST_BACKTRACE=0\n\
             mkdir -p /proc /sys /dev /run /tmp\n\
             mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n\
             mount -t tmpfs run /run\nmount -t tmpfs tmp /tmp\n\
             mount -t cgroup2 cgroup /sys/fs/cgroup\nmount -t bpf bpf /sys/fs/bpf\n\
             dmesg -n 1\nip link set lo up\n\
             {load}\
             echo; echo '{BEGIN}'\n\
             sh /script\n\
             echo \"{END}$?\"\n\
             poweroff -f\n"
        )
    }
}

/// Name of the guest's root among its working files.
const ROOT: &str = "root.cpio";
/// The console's line before what the script prints.
const BEGIN: &str = "culvert-vm: begin";
/// Start of the console's line with the script's status.
const END: &str = "culvert-vm: status ";

/// A module's file.
struct Module {
    name: String,
    path: PathBuf,
}

impl Carried {
    fn bytes(&self, work: &Path) -> Result<Vec<u8>> {
        if !self.stripped {
            return Ok(fs::read(&self.here)?);
        }
        let lean = work.join("stripped");
        let arguments = ["--strip-debug".as_ref(), "-o".as_ref(), lean.as_os_str(), self.here.as_os_str()];
        command::run("strip", &arguments)?;
        Ok(fs::read(&lean)?)
    }
}

impl Module {
    fn bytes(&self, work: &Path) -> Result<Vec<u8>> {
        if self.path.extension().is_none_or(|e| e != "xz") {
            return fs::read(&self.path).with_context(|| format!("read {}", self.path.display()));
        }
        let unpacked = work.join(format!("{}.ko", self.name));
        let out = File::create(&unpacked).with_context(|| format!("create {}", unpacked.display()))?;
        let mut xz = Command::new("xz");
        let status = xz.arg("-dc").arg(&self.path).stdout(out).status().context("start xz")?;
        if !status.success() {
            bail!("`xz -dc {}` ended with {status}", self.path.display());
        }
        fs::read(&unpacked).with_context(|| format!("read {}", unpacked.display()))
    }

    /// What the module says it depends on.
    fn dependencies(&self, work: &Path) -> Result<Vec<String>> {
        let bytes = self.bytes(work)?;
        let mark = b"\0depends=";
        let Some(at) = bytes.windows(mark.len()).position(|w| w == mark) else { return Ok(Vec::new()) };
        let rest = &bytes[at + mark.len()..];
        let text = String::from_utf8_lossy(&rest[..rest.iter().position(|&b| b == 0).unwrap_or(0)]).into_owned();
        Ok(text.split(',').filter(|d| !d.is_empty()).map(|d| d.replace('-', "_")).collect())
    }
}

impl Unpacked {
    /// The named modules and those they depend on, each after what it needs.
    fn with_dependencies(&self, names: &[String]) -> Result<Vec<Module>> {
        let mut files = BTreeMap::new();
        list_modules(&self.dir.join("modules"), &mut files)?;
        let work = tempdir()?;
        let mut ordered = Vec::new();
        let added = names.iter().try_for_each(|name| self.add(name, &files, &work, &mut ordered));
        fs::remove_dir_all(&work)?;
        added.map(|()| ordered)
    }

    fn add(&self, name: &str, files: &BTreeMap<String, PathBuf>, work: &Path, ordered: &mut Vec<Module>) -> Result<()> {
        if ordered.iter().any(|m| m.name == name) {
            return Ok(());
        }
        // Not a file: built into this kernel, or a mistake, which the script that needs it will show.
        let Some(path) = files.get(name) else { return Ok(()) };
        let module = Module { name: name.to_owned(), path: path.clone() };
        for needed in module.dependencies(work)? {
            self.add(&needed, files, work, ordered)?;
        }
        ordered.push(module);
        Ok(())
    }
}

fn list_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list_modules(&entry.path(), files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn tempdir() -> Result<PathBuf> {
    let dir =
        std::env::temp_dir().join(format!("culvert-modules-{}-{:?}", std::process::id(), std::thread::current().id()));
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// The last lines, which say why.
fn tail(text: &str) -> String {
    const LINES: usize = 80;
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// A file archive as the kernel unpacks it (cpio, "newc": Linux, Documentation/driver-api/early-userspace/buffer-format).
struct Archive<W> {
    out: W,
    inode: u32,
    dirs: Vec<String>,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> io::Result<Self> {
        let mut archive = Self { out, inode: 0, dirs: Vec::new() };
        archive.parents("dev/console")?;
        // The first process's input and output, before /dev is mounted: a character device, 5:1.
        archive.entry("dev/console", 0o020_600, (5, 1), &[])?;
        Ok(archive)
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, 0o100_000 | mode, (0, 0), bytes)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            let dir = path[..at].to_owned();
            if !self.dirs.contains(&dir) {
                self.entry(&dir, 0o040_755, (0, 0), &[])?;
                self.dirs.push(dir);
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(bytes.len()).map_err(|_| io::Error::other(format!("{path} is larger than 4 GiB")))?;
        let name = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.padded(&[header.as_bytes(), path.as_bytes(), b"\0"].concat())?;
        self.padded(bytes)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out.write_all(&[0; 3][..(4 - bytes.len() % 4) % 4])
    }

    fn end(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_the_one_with_the_largest_numbers() {
        let old = numbers("linux-image-6.1.0-9-cloud-amd64");
        assert!(numbers("linux-image-6.1.0-56-cloud-amd64") > old);
    }

    #[test]
    fn entries_of_an_archive_are_aligned() {
        let mut out = Vec::new();
        let mut archive = Archive::new(&mut out).expect("a vector takes it");
        archive.file("a/b/c", 0o644, b"12345").expect("a vector takes it");
        archive.end().expect("a vector takes it");
        assert_eq!(out.len() % 4, 0);
        let text = String::from_utf8_lossy(&out);
        for path in ["dev\0", "dev/console\0", "a\0", "a/b\0", "a/b/c\0", "TRAILER!!!\0"] {
            assert!(text.contains(path), "{path}");
        }
    }
}
