//! `image`: the container image of `culvert`, as an archive, from this checkout alone.
//!
//! The binary is built without the places that it was built in, so two clones at different paths, and machines with the same
//! compilers, make the same image: same bytes, same digest. Nothing else is in the image but what Kubernetes and a static
//! program ask for; who runs it is for the pod to say.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::oci::{self, Digest, culvert};
use culvert_tests::sandbox::built;
use culvert_tests::{command, interrupt};

use crate::setup::{self, Ready, root};
use crate::{build, say};

/// What the image is called unless told otherwise, and in deploy/.
const NAME: &str = concat!("culvert:", env!("CARGO_PKG_VERSION"));
/// What an archive may have; each node pulls it.
const MAX_BYTES: u64 = 40 << 20;
const MIB: f64 = (1 << 20) as f64;

/// Arguments of `image`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The archive to write [default: target/image/culvert.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What the image is called
    #[arg(long, value_name = "NAME:TAG", default_value = NAME)]
    name: String,
    /// Take the binary of `cargo xtask build`, stripped: not optimised, and with this machine's paths in it
    #[arg(long)]
    debug: bool,
    /// Build it again in a copy of this checkout at another path, and fail unless both images are the same
    #[arg(long)]
    twice: bool,
}

/// How the binary is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Profile {
    /// As it is installed.
    Image,
    /// Quicker to build; for tests.
    Dev,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let name = oci::Name::parse(&arguments.name)?;
    let output = arguments.output.clone().unwrap_or_else(|| root().join("target/image/culvert.tar"));
    let folder = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let ready = setup::run(setup::For::Build)?;
    let profile = if arguments.debug { Profile::Dev } else { Profile::Image };
    let digest = match (profile, arguments.twice) {
        (_, true) => twice(&ready, profile, &arguments.name, &output)?,
        (Profile::Image, false) => culvert::pack(&compile(&ready, root(), profile)?, &arguments.name, &output)?,
        (Profile::Dev, false) => {
            build::run(&ready)?;
            culvert::pack(&strip(&built("culvert")?, root())?, &arguments.name, &output)?
        }
    };
    let bytes = fs::metadata(&output).with_context(|| format!("look at {}", output.display()))?.len();
    println!("name    {name}\ndigest  {digest}\nsize    {:.1} MiB\narchive {}", bytes as f64 / MIB, output.display());
    small_enough(&output, profile)
}

/// Fails for an archive that is too big to be installed.
fn small_enough(archive: &Path, profile: Profile) -> Result<()> {
    let bytes = fs::metadata(archive).with_context(|| format!("look at {}", archive.display()))?.len();
    ensure!(
        profile == Profile::Dev || bytes <= MAX_BYTES,
        "{} has {bytes} bytes, more than the {MAX_BYTES} that an image may have: find what made the binary bigger",
        archive.display()
    );
    Ok(())
}

/// The archive of an image of the binary that was built for development.
///
/// # Errors
/// It was not built.
pub(crate) fn for_tests() -> Result<PathBuf> {
    let output = root().join("target/image/culvert-debug.tar");
    culvert::pack(&strip(&built("culvert")?, root())?, NAME, &output)?;
    Ok(output)
}

/// Builds the image in this checkout and in a copy of it at another path, and leaves the first as `output`.
///
/// # Errors
/// The images differ, or one could not be built.
fn twice(ready: &Ready, profile: Profile, name: &str, output: &Path) -> Result<Digest> {
    let binary = compile(ready, root(), profile)?;
    let here = culvert::pack(&binary, name, output)?;
    let copy = Copy::make()?;
    let other = compile(ready, &copy.checkout(), profile)?;
    let there = culvert::pack(&other, name, &copy.0.join("culvert.tar"))?;
    if here != there {
        let kept = root().join("target/image/culvert-elsewhere");
        fs::copy(&other, &kept).with_context(|| format!("keep {}", kept.display()))?;
        bail!(
            "the same files at another path made another image, {there} instead of {here}: find a path, a time or an order \
             in which {} and {} differ",
            binary.display(),
            kept.display()
        );
    }
    say::done(&format!("{} makes the same image", copy.checkout().display()));
    Ok(here)
}

/// Builds the image in two clones with `ready`, for `test --full`.
///
/// # Errors
/// As for [`twice`]; or it is too big.
pub(crate) fn from_two_clones(ready: &Ready) -> Result<Digest> {
    let output = root().join("target/image/two-clones.tar");
    let digest = twice(ready, Profile::Image, NAME, &output)?;
    small_enough(&output, Profile::Image)?;
    Ok(digest)
}

/// Builds the binary of a checkout so that no place is in it, and gives its path.
fn compile(ready: &Ready, checkout: &Path, profile: Profile) -> Result<PathBuf> {
    let name = match profile {
        Profile::Image => "image",
        Profile::Dev => "dev",
    };
    let step =
        say::step(&format!("build culvert for the image in {} (a first build takes minutes)", checkout.display()));
    let compiler = Compiler::of(&["rustc"])?;
    // A folder of its own: cargo does not see that what is in another was compiled without the wrapper.
    let target = checkout.join("target/image/build");
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    let places = Places::find(checkout, &compiler, &Compiler::of(&["rustup", "run", &ready.toolchain.name, "rustc"])?)?;
    let mut cargo = ready.cargo_command(&["build", "--locked", "--package", "culvert", "--bin", "culvert"])?;
    cargo.args(["--profile", name, "--target-dir"]).arg(&target).current_dir(checkout);
    // The flags of the checkout's .cargo/config.toml count, and not those of whoever builds.
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER"] {
        cargo.env_remove(variable);
    }
    cargo.env("RUSTC_WRAPPER", places.wrapper(&target)?).env("CFLAGS", places.c_flags());
    let status = setup::run_cargo(&mut cargo, |_| {})?;
    interrupt::check()?;
    ensure!(status.success(), "`{}` ended with {status}; what it printed is above", command::describe(&cargo));
    step.done();
    let folder = if profile == Profile::Dev { "debug" } else { name };
    let binary = target.join(&compiler.host).join(folder).join("culvert");
    match profile {
        Profile::Image => Ok(binary),
        Profile::Dev => strip(&binary, checkout),
    }
}

/// The binary without symbols, beside the archive.
fn strip(binary: &Path, checkout: &Path) -> Result<PathBuf> {
    let folder = checkout.join("target/image");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    culvert::strip(binary, &folder.join("culvert-debug"))
}

/// What a compiler says of itself.
struct Compiler {
    host: String,
    commit: String,
    sysroot: String,
}

impl Compiler {
    fn of(words: &[&str]) -> Result<Self> {
        let ask = |question: &[&str]| {
            let mut rustc = Command::new(words[0]);
            command::finish(rustc.args(&words[1..]).args(question).current_dir(root()), None)
        };
        let said = ask(&["-vV"])?;
        let line = |name| {
            let found = said.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
            found.with_context(|| format!("`{} -vV` tells no {name}", words.join(" ")))
        };
        Ok(Self {
            host: line("host: ")?,
            commit: line("commit-hash: ")?,
            sysroot: ask(&["--print", "sysroot"])?.trim().to_owned(),
        })
    }

    /// Where its library's sources lie if they are installed, and how it calls them if they are not.
    fn sources(&self) -> (String, String) {
        (format!("{}/lib/rustlib/src/rust", self.sysroot), format!("/rustc/{}", self.commit))
    }
}

/// Paths of this machine, and what stands for each in the binary.
struct Places(Vec<(String, String)>);

impl Places {
    fn find(checkout: &Path, compiler: &Compiler, ebpf: &Compiler) -> Result<Self> {
        let home = match env::var_os("CARGO_HOME").filter(|home| !home.is_empty()) {
            Some(home) => PathBuf::from(home),
            None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
        };
        // Of several that fit a path, compilers take the last.
        let places = vec![
            compiler.sources(),
            ebpf.sources(),
            (plain(&home)?, "/cargo".to_owned()),
            (plain(checkout)?, "/culvert".to_owned()),
        ];
        Ok(Self(places))
    }

    /// Writes the program that cargo runs in place of every rustc.
    ///
    /// Not RUSTFLAGS: cargo names folders, and so paths of generated code, by a hash of them; and the eBPF crate's build, which
    /// has flags of its own, would not get them.
    fn wrapper(&self, folder: &Path) -> Result<PathBuf> {
        let flags: String = self.0.iter().map(|(from, to)| format!(" '--remap-path-prefix={from}={to}'")).collect();
        let path = folder.join("rustc-without-places");
        let text = format!("#!/bin/sh\nexec \"$@\"{flags}\n");
        // Cargo asks the compiler again when this file is newer.
        if fs::read_to_string(&path).ok().as_deref() != Some(&text) {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(path)
    }

    /// The same for C.
    fn c_flags(&self) -> String {
        let flags = self.0.iter().map(|(from, to)| format!("-ffile-prefix-map={from}={to}"));
        flags.collect::<Vec<_>>().join(" ")
    }
}

/// A path that needs no quoting; the C libraries' own build scripts know none.
fn plain(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(
        text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+@,".contains(c)),
        "{text} has a character that the build scripts of C libraries do not take: move it to a plain path"
    );
    Ok(text.to_owned())
}

/// A copy of this checkout, with its build, below /var/tmp; dropping it removes it.
struct Copy(PathBuf);

impl Copy {
    /// Copies what git knows and does not ignore, as it is here and now.
    ///
    /// # Errors
    /// This is no git checkout, or a file could not be copied.
    fn make() -> Result<Self> {
        sweep()?;
        let copy = Self(Path::new(COPIES).join(format!("{COPY}{}", process::id())));
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root());
        let listed = command::finish(&mut git, None).context("list the files of this checkout")?;
        for name in listed.split('\0').filter(|name| !name.is_empty()) {
            let (from, to) = (root().join(name), copy.checkout().join(name));
            // Removed here, and git has not been told.
            if !from.exists() {
                continue;
            }
            fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
            fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        }
        Ok(copy)
    }

    fn checkout(&self) -> PathBuf {
        self.0.join("another/path")
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            say::warn(&format!("remove {}: {error}", self.0.display()));
        }
    }
}

const COPIES: &str = "/var/tmp";
const COPY: &str = "culvert-image-";

/// Removes copies whose makers were killed.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(COPIES).with_context(|| format!("list {COPIES}"))? {
        let entry = entry?;
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(COPY)).and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            fs::remove_dir_all(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_debug_image_may_be_big() {
        let archive = env::temp_dir().join(format!("culvert-big-image-{}.tar", process::id()));
        let file = fs::File::create(&archive).expect("a file");
        file.set_len(MAX_BYTES).expect("a size");
        let exact = small_enough(&archive, Profile::Image);
        file.set_len(MAX_BYTES + 1).expect("a size");
        let (big, debug) = (small_enough(&archive, Profile::Image), small_enough(&archive, Profile::Dev));
        fs::remove_file(&archive).expect("remove it");
        exact.expect("it fits");
        assert!(big.expect_err("it does not fit").to_string().contains("41943041 bytes, more than the 41943040"));
        debug.expect("nobody installs it");
    }

    #[test]
    fn paths_that_c_build_scripts_do_not_take_are_refused() {
        assert_eq!(plain(Path::new("/home/a/culvert-0.1")).expect("plain"), "/home/a/culvert-0.1");
        for path in ["/home/a b/culvert", "/home/a'b", "/home/a=b", "/home/ä"] {
            let error = plain(Path::new(path)).expect_err(path).to_string();
            assert!(error.starts_with(path), "{error}");
        }
    }

    #[test]
    fn the_arguments_of_the_compiler_end_with_what_stands_for_places() {
        let places = Places(vec![("/home/a".to_owned(), "/x".to_owned()), ("/home/a/b".to_owned(), "/y".to_owned())]);
        let folder = env::temp_dir().join(format!("culvert-wrapper-{}", process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let wrapper = places.wrapper(&folder).expect("a wrapper");
        let said = command::run(wrapper.to_str().expect("UTF-8"), &["echo", "a b"]);
        fs::remove_dir_all(&folder).expect("remove the folder");
        assert_eq!(said.expect("it runs"), "a b --remap-path-prefix=/home/a=/x --remap-path-prefix=/home/a/b=/y\n");
        assert_eq!(places.c_flags(), "-ffile-prefix-map=/home/a=/x -ffile-prefix-map=/home/a/b=/y");
    }
}
