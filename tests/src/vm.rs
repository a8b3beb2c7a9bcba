//! Another kernel, booted under QEMU, running one script: the supported floor is tested on the kernels themselves.
//!
//! A guest has no disk. Its root is a file archive made here: busybox, the modules it asks for, the given programs with
//! their shared libraries. Its console is the result: what the script printed, and its exit status.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{command, interrupt};

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
        let package = self.newest_package()?;
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

    fn newest_package(self) -> Result<String> {
        let pattern = format!("^linux-image-{}\\.[^-]*(-[0-9]+)?-cloud-amd64$", self.series().replace('.', "\\."));
        let found = command::run("apt-cache", &["search", "--names-only", &pattern])?;
        let names = found.lines().filter_map(|l| l.split(' ').next());
        names.max_by_key(|name| numbers(name)).map(str::to_owned).with_context(|| {
            format!(
                "apt offers no {}: Debian 12 has it; put its sources into /etc/apt to test on kernel {}",
                self.package(),
                self.series()
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
    /// Path in the guest, path here.
    files: BTreeMap<String, PathBuf>,
    memory_mib: u32,
    limit: Duration,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report {
    /// Exit status of the script.
    pub status: i32,
    /// What the script and its programs printed.
    pub output: String,
    /// From QEMU's start to its end.
    pub took: Duration,
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
            limit: Duration::from_secs(300),
        }
    }

    /// With a module, and those it depends on, loaded before the script runs. One that is built in is no error.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// With a file of this machine at a path of the guest.
    #[must_use]
    pub fn file(mut self, here: impl Into<PathBuf>, there: &str) -> Self {
        self.files.insert(there.to_owned(), here.into());
        self
    }

    /// With a program of this machine in `/bin`, and the shared libraries it needs where it looks for them. The script calls
    /// it by its path where busybox has a program of the same name.
    ///
    /// # Errors
    /// `ldd` failed.
    pub fn program(mut self, here: &Path) -> Result<Self> {
        let name = here.file_name().context("a program without a name")?.to_string_lossy().into_owned();
        self.files.insert(format!("/bin/{name}"), here.to_owned());
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
                self.files.insert(path.to_owned(), path.into());
            }
        }
        Ok(self)
    }

    /// Boots `kernel`, runs the script, and returns when the guest has switched itself off.
    ///
    /// # Errors
    /// QEMU could not be run, the guest did not end in time, or it ended without a status; the error shows its console.
    pub fn boot(&self, kernel: &Unpacked) -> Result<Report> {
        // One at a time, and one processor each: guests that wait for each other's processors on a busy machine take
        // minutes to boot.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let work = std::env::temp_dir().join(format!("culvert-vm-{}-{}", std::process::id(), kernel.release));
        fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
        let report = self.boot_in(kernel, &work);
        fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
        report
    }

    fn boot_in(&self, kernel: &Unpacked, work: &Path) -> Result<Report> {
        let root = work.join("root.cpio");
        self.archive(kernel, work, &root).context("make the guest's root")?;
        if Path::new("/dev/kvm").exists() && !KVM_FAILED.load(Ordering::Relaxed) {
            // Inside another virtual machine KVM may be there and not work: QEMU aborts, or the guest never starts.
            match self.run_qemu(kernel, work, &root, &["-accel", "kvm", "-cpu", "host"], KVM_FIRST_WORD)? {
                Some(report) => return Ok(report),
                None => KVM_FAILED.store(true, Ordering::Relaxed),
            }
        }
        // Translation is some twenty times slower, and right.
        let report = self.run_qemu(kernel, work, &root, &["-accel", "tcg", "-cpu", "max"], self.limit)?;
        report.with_context(|| format!("the kernel printed nothing; QEMU: {}", read_lossy(&work.join("qemu")).trim()))
    }

    /// Runs QEMU to its end; `None` if the guest's kernel said nothing within `first_word`, or QEMU ended before it did.
    fn run_qemu(
        &self,
        kernel: &Unpacked,
        work: &Path,
        root: &Path,
        machine: &[&str],
        first_word: Duration,
    ) -> Result<Option<Report>> {
        let console = work.join("console");
        File::create(&console).context("create the guest's console")?;
        let begun = Instant::now();
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-smp", "1"])
            .args(machine)
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-append", "console=ttyS0 panic=-1 rdinit=/init"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(kernel.dir.join("vmlinuz"))
            .arg("-initrd")
            .arg(root)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(work.join("qemu")).context("create QEMU's log")?)
            .process_group(0);
        // SAFETY: prctl(2) is async-signal-safe; the thread whose end is meant is this one, which waits below.
        unsafe {
            qemu.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut child = qemu.spawn().context("start qemu-system-x86_64")?;
        let why = loop {
            if let Some(status) = child.try_wait().context("wait for QEMU")? {
                break if status.success() { None } else { Some(format!("QEMU ended with {status}")) };
            }
            let silent = fs::metadata(&console).map_or(0, |m| m.len()) == 0;
            let why = if silent && begun.elapsed() > first_word {
                "the guest says nothing".to_owned()
            } else if begun.elapsed() > self.limit {
                format!("the guest still runs after {} s", self.limit.as_secs())
            } else if interrupt::requested() {
                "interrupted".to_owned()
            } else {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            child.kill().context("end QEMU")?;
            child.wait().context("wait for QEMU")?;
            break Some(why);
        };
        interrupt::check()?;
        let text = read_lossy(&console).replace('\r', "");
        if text.is_empty() {
            return Ok(None);
        }
        let ended = text.split_once(BEGIN).and_then(|(_, rest)| rest.rsplit_once(END));
        let Some((output, rest)) = ended.filter(|_| why.is_none()) else {
            bail!("{}; its console:\n{text}", why.unwrap_or_else(|| "the guest ended without a status".to_owned()));
        };
        let status = rest.trim().lines().next().unwrap_or("").parse().context("the guest's status")?;
        Ok(Some(Report { status, output: output.trim().to_owned(), took: begun.elapsed() }))
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
        for (there, here) in &self.files {
            let mode =
                fs::metadata(here).with_context(|| format!("look at {}", here.display()))?.permissions().mode() & 0o777;
            let bytes = fs::read(here).with_context(|| format!("read {}", here.display()))?;
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

/// How long a guest under KVM may take until its kernel says anything; where KVM works it is a fraction of a second.
const KVM_FIRST_WORD: Duration = Duration::from_secs(10);
/// Whether KVM was tried by this process and does not work.
static KVM_FAILED: AtomicBool = AtomicBool::new(false);
/// The console's line before what the script prints.
const BEGIN: &str = "culvert-vm: begin";
/// Start of the console's line with the script's status.
const END: &str = "culvert-vm: status ";

/// A module's file.
struct Module {
    name: String,
    path: PathBuf,
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
