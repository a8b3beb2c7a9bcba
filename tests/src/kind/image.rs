//! The image of a node, from parts: a Debian base, the files of kind's own module, the programs of [`super::parts`], and the
//! control plane's images, put into containerd's store.
//!
//! It is what kind's own build makes, from the same files and in the same order, without a registry. What differs is said
//! where it is done.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::engine::Engine;
use super::parts::Parts;
use crate::apiserver::assets::{KUBERNETES, key};
use crate::oci;
use crate::{command, interrupt};

/// Debian's release: the one after it has a systemd that refuses cgroup v1.
const RELEASE: &str = "bookworm";
/// What of Debian a node has.
const PACKAGES: &str = "systemd,conntrack,iptables,nftables,iproute2,ethtool,util-linux,mount,kmod,libseccomp2,pigz,\
                        e2fsprogs,bash,ca-certificates,jq,procps,hostname";
/// Fills containerd's store in a mount namespace of its own.
const PRELOAD: &str = include_str!("../../nodes/preload.sh");
/// Kernel-wide settings that a kubelet and systemd write, and what they write.
const SETTINGS: &str = include_str!("../../nodes/kernel-settings.sh");

/// Where a built image lies.
#[derive(Debug, Clone)]
pub struct NodeImage {
    dir: PathBuf,
}

impl NodeImage {
    /// The image that was built into the cache.
    ///
    /// # Errors
    /// There is none; the error is one line with the remedy.
    pub fn find() -> Result<Self> {
        let image = Self::cached()?;
        ensure!(image.is_built(), "the image of a Kubernetes node is not built: run `cargo xtask kind-image`");
        Ok(image)
    }

    /// The image, built or not: the name of its folder says what it is built from.
    ///
    /// # Errors
    /// There is no cache directory.
    pub fn cached() -> Result<Self> {
        let parts = format!("{:016x}", Parts::key());
        let name = format!(
            "kind-node-{KUBERNETES}-{:016x}",
            key(&[
                &parts,
                include_str!("image.rs"),
                PRELOAD,
                SETTINGS,
                include_str!("../oci/mod.rs"),
                include_str!("../oci/tar.rs")
            ])
        );
        Ok(Self { dir: crate::cache().context("where images are kept")?.join("tools").join(name) })
    }

    /// Whether it is there.
    pub fn is_built(&self) -> bool {
        self.dir.join("complete").is_file()
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The store that has it, for podman.
    pub(super) fn store(&self) -> PathBuf {
        Engine::store(&self.dir)
    }

    /// The name by which podman knows it.
    pub fn name() -> String {
        format!("localhost/kind-node:v{KUBERNETES}")
    }

    /// Builds it; `tell` is told of each step. Takes a minute and a half, and 3 GB meanwhile.
    ///
    /// # Errors
    /// A step failed.
    pub fn build(&self, parts: &Parts, mut tell: impl FnMut(&str)) -> Result<()> {
        remove(&self.dir)?;
        let work = self.dir.join("work");
        fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
        tell("the Debian base of the node, by mmdebstrap");
        let base = work.join("base.tar");
        debian(&base)?;
        let root = Root { dir: work.join("root"), parts, work: &work };
        fs::create_dir_all(&root.dir).with_context(|| format!("create {}", root.dir.display()))?;
        tell("files of kind, programs of Kubernetes");
        let unpack = ["--exclude=./dev/*", "--numeric-owner", "-xpf"];
        command::finish(Command::new("tar").arg("-C").arg(&root.dir).args(unpack).arg(&base), None)?;
        root.files()?;
        root.programs()?;
        root.differences()?;
        tell("images of the control plane");
        root.images()?;
        interrupt::check()?;
        tell("the whole of it, for podman");
        let node = work.join("node.tar");
        let pack = ["--numeric-owner", "-cf"];
        command::finish(Command::new("tar").arg("-C").arg(&root.dir).args(pack).arg(&node).arg("."), None)?;
        let engine = Engine::create(&self.dir, None, None, parts)?;
        let node = node.display().to_string();
        engine.podman(&[
            "import",
            "--quiet",
            "--change",
            r#"ENTRYPOINT ["/usr/local/bin/entrypoint","/sbin/init"]"#,
            "--change",
            "ENV container=docker",
            "--change",
            "STOPSIGNAL SIGRTMIN+3",
            &node,
            &Self::name(),
        ])?;
        engine.remove_all()?;
        remove(&work)?;
        fs::write(self.dir.join("complete"), "").with_context(|| format!("write to {}", self.dir.display()))
    }
}

fn debian(archive: &Path) -> Result<()> {
    let mut debootstrap = Command::new("mmdebstrap");
    debootstrap.args(["--variant=minbase", "--mode=root", "--quiet", "--aptopt=Acquire::Languages \"none\""]);
    for place in ["man", "doc", "locale"] {
        debootstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{place}/*"));
    }
    debootstrap.arg(format!("--include={PACKAGES}")).arg(RELEASE).arg(archive);
    command::finish(&mut debootstrap, None).context("the Debian base of the node")?;
    interrupt::check()
}

/// The file system of the node while it is made.
struct Root<'a> {
    dir: PathBuf,
    parts: &'a Parts,
    work: &'a Path,
}

impl Root<'_> {
    fn at(&self, path: &str) -> PathBuf {
        self.dir.join(path.trim_start_matches('/'))
    }

    fn put(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let to = self.at(to);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).with_context(|| format!("mode of {}", to.display()))
    }

    /// Every file of a folder, without the folders in it.
    fn put_all(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                self.put(&entry.path(), &format!("{to}/{}", entry.file_name().to_string_lossy()), mode)?;
            }
        }
        Ok(())
    }

    fn write(&self, path: &str, text: &str, mode: u32) -> Result<()> {
        let path = self.at(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("mode of {}", path.display()))
    }

    /// Removes the files of a folder whose names have this in them.
    fn clear(&self, folder: &str, part: &str) -> Result<()> {
        let folder = self.at(folder);
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(part) && !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }

    fn inside(&self, words: &[&str]) -> Result<String> {
        command::finish(Command::new("chroot").arg(&self.dir).args(words), None)
    }

    /// What kind's images/base/Dockerfile does, in its order.
    fn files(&self) -> Result<()> {
        let files = self.parts.kind_files();
        self.put_all(&files.join("usr/local/bin"), "/usr/local/bin", 0o755)?;
        self.put_all(&files.join("kind/bin"), "/kind/bin", 0o755)?;
        self.put(&files.join("etc/crictl.yaml"), "/etc/crictl.yaml", 0o644)?;
        for folder in ["containerd", "default", "sysctl.d", "systemd/system", "systemd/system/kubelet.service.d"] {
            self.put_all(&files.join("etc").join(folder), &format!("/etc/{folder}"), 0o644)?;
        }
        for folder in ["/kind/manifests", "/etc/kubernetes/manifests", "/opt/cni/bin", "/var/lib/containerd"] {
            let folder = self.at(folder);
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        let wants = "/lib/systemd/system/sysinit.target.wants";
        self.clear(wants, "systemd-tmpfiles-setup.service")?;
        for (folder, part) in [
            ("/lib/systemd/system/multi-user.target.wants", ""),
            ("/lib/systemd/system/local-fs.target.wants", ""),
            ("/lib/systemd/system/sockets.target.wants", "udev"),
            ("/lib/systemd/system/sockets.target.wants", "initctl"),
            ("/lib/systemd/system/basic.target.wants", ""),
        ] {
            self.clear(folder, part)?;
        }
        let system = self.at("/etc/systemd/system");
        for entry in fs::read_dir(&system).with_context(|| format!("list {}", system.display()))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".wants") {
                self.clear(&format!("/etc/systemd/system/{name}"), "")?;
            }
        }
        let journald = self.at("/etc/systemd/journald.conf");
        let text = fs::read_to_string(&journald).with_context(|| format!("read {}", journald.display()))?;
        self.write("/etc/systemd/journald.conf", &format!("{text}ReadKMsg=no\n"), 0o644)?;
        let init = self.at("/sbin/init");
        remove(&init)?;
        symlink("/usr/lib/systemd/systemd", &init).with_context(|| format!("link {}", init.display()))?;
        self.inside(&[
            "systemctl",
            "-q",
            "enable",
            "kubelet.service",
            "containerd.service",
            "undo-mount-hacks.service",
        ])?;
        self.inside(&["systemctl", "-q", "mask", "systemd-binfmt.service"])?;
        Ok(())
    }

    fn programs(&self) -> Result<()> {
        for (folder, names) in [
            ("/usr/local/bin", &["containerd", "containerd-shim-runc-v2", "ctr"][..]),
            ("/usr/local/sbin", &["runc"]),
            ("/usr/bin", &["kubelet", "kubectl", "kubeadm"]),
            ("/opt/cni/bin", &["cni/host-local", "cni/loopback", "cni/portmap", "cni/ptp"]),
        ] {
            for name in names {
                let file = name.rsplit('/').next().unwrap_or(name);
                self.put(&self.parts.program(name), &format!("{folder}/{file}"), 0o755)?;
            }
        }
        self.write("/kind/version", &format!("v{KUBERNETES}"), 0o644)?;
        // As kind's own build: what every container is made by, with kind's hook and without limits.
        let spec: serde_json::Value = serde_json::from_str(&self.inside(&["ctr", "oci", "spec"])?)?;
        let mut spec = spec;
        spec["hooks"]["createContainer"] = serde_json::json!([{ "path": "/kind/bin/mount-product-files.sh" }]);
        if let Some(process) = spec["process"].as_object_mut() {
            process.remove("rlimits");
        }
        self.write("/etc/containerd/cri-base.json", &serde_json::to_string(&spec)?, 0o644)?;
        let storage = "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: standard}\n\
                       provisioner: kubernetes.io/no-provisioner\n";
        self.write("/kind/manifests/default-storage.yaml", storage, 0o644)
    }

    /// Where this is another node than kind's own.
    fn differences(&self) -> Result<()> {
        let config = self.at("/etc/containerd/config.toml");
        let text = fs::read_to_string(&config).with_context(|| format!("read {}", config.display()))?;
        let (theirs, ours) = ("restrict_oom_score_adj = false", "restrict_oom_score_adj = true");
        ensure!(text.contains(theirs), "{} has no line `{theirs}`", config.display());
        // Without CAP_SYS_RESOURCE; kind's entrypoint does the same in a user namespace.
        self.write("/etc/containerd/config.toml", &text.replace(theirs, ours), 0o644)?;
        // A node's settings of the kernel would be the machine's: files that hold the wanted values are put over them.
        self.clear("/usr/lib/sysctl.d", "")?;
        self.write("/kind/bin/kernel-settings.sh", SETTINGS, 0o755)?;
        let before = "[Service]\nExecStartPre=/kind/bin/kernel-settings.sh\n";
        self.write("/etc/systemd/system/undo-mount-hacks.service.d/kernel-settings.conf", before, 0o644)
    }

    /// The control plane's images, under the names that kubeadm gives them.
    fn images(&self) -> Result<()> {
        let folder = self.work.join("images");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let list = command::finish(
            Command::new(self.parts.program("kubeadm"))
                .args(["config", "images", "list", "--kubernetes-version"])
                .arg(format!("v{KUBERNETES}")),
            None,
        )?;
        let named = |part: &str| -> Result<String> {
            let name = list.lines().find(|line| line.contains(part)).with_context(|| format!("{part} in {list}"))?;
            Ok(name.to_owned())
        };
        let write = |image: oci::Image, name: &str| -> Result<()> {
            image.write(&folder.join(format!("{name}.tar"))).map(drop).with_context(|| format!("the image {name}"))
        };
        for name in ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd"] {
            let image = oci::Image::new(&named(&format!("/{name}:"))?);
            let image = image.file(self.parts.program(name), &format!("/usr/bin/{name}"), 0o755);
            write(image.env("PATH", "/usr/bin:/bin"), name)?;
        }
        for (name, of, file) in [("coredns", named("/coredns:")?, "/coredns"), ("pause", self.pause()?, "/pause")] {
            let image = oci::Image::new(&of).file(self.parts.program(name), file, 0o755).entrypoint([file]);
            write(image, name)?;
        }
        write(self.kube_proxy(&named("/kube-proxy:")?)?, "kube-proxy")?;
        let script = self.work.join("preload.sh");
        fs::write(&script, PRELOAD).with_context(|| format!("write {}", script.display()))?;
        let mut preload = Command::new("unshare");
        preload.args(["--mount", "sh"]).arg(&script).arg(&self.dir).arg(&folder);
        command::finish(&mut preload, None).context("put the control plane's images into containerd's store")?;
        for folder in ["run", "tmp"] {
            for entry in fs::read_dir(self.at(folder)).with_context(|| format!("list {folder}"))? {
                remove(&entry?.path())?;
            }
        }
        Ok(())
    }

    /// The name of the image of a pod's first process, as kind's containerd asks for it.
    fn pause(&self) -> Result<String> {
        let config = fs::read_to_string(self.at("/etc/containerd/config.toml"))?;
        let words = config.split(['"', '\'', ' ', '\n']);
        let found = words.filter(|word| word.contains("/pause:")).map(str::to_owned).next();
        found.context("containerd's configuration names no image of a pause container")
    }

    /// kube-proxy calls nft, iptables and conntrack, which need their libraries.
    fn kube_proxy(&self, name: &str) -> Result<oci::Image> {
        let extensions = self.at("/usr/lib/x86_64-linux-gnu/xtables");
        let mut files = vec![
            "/usr/sbin/nft".to_owned(),
            "/usr/sbin/xtables-nft-multi".to_owned(),
            "/usr/sbin/conntrack".to_owned(),
        ];
        let mut image = oci::Image::new(name).env("PATH", "/usr/local/bin:/sbin:/bin");
        image = image.file(self.parts.program("kube-proxy"), "/usr/local/bin/kube-proxy", 0o755);
        for program in &files {
            let file = program.rsplit('/').next().unwrap_or(program);
            image = image.file(self.at(program), &format!("/sbin/{file}"), 0o755);
        }
        for entry in fs::read_dir(&extensions).with_context(|| format!("list {}", extensions.display()))? {
            let entry = entry?;
            let there = format!("/usr/lib/x86_64-linux-gnu/xtables/{}", entry.file_name().to_string_lossy());
            image = match fs::read_link(entry.path()) {
                Ok(target) => image.symlink(&target.to_string_lossy(), &there),
                Err(_) => image.file(entry.path(), &there, 0o644),
            };
            files.push(there);
        }
        let mut ldd = vec!["ldd"];
        ldd.extend(files.iter().map(String::as_str));
        let printed = self.inside(&ldd)?;
        let mut libraries: Vec<&str> = printed
            .lines()
            .filter(|line| line.starts_with('\t'))
            .flat_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
            .collect();
        libraries.sort_unstable();
        libraries.dedup();
        for library in libraries {
            let file = self.inside(&["readlink", "-f", library])?;
            image = image.file(self.at(file.trim()), library, 0o755);
        }
        for family in ["iptables", "ip6tables"] {
            for form in ["", "-save", "-restore", "-nft", "-nft-save", "-nft-restore"] {
                image = image.symlink("xtables-nft-multi", &format!("/sbin/{family}{form}"));
            }
        }
        Ok(image)
    }
}

fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
