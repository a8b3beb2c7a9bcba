//! Which programs make the API server of the tests, in which versions, and where they lie; building them is `xtask`'s.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Version of kube-apiserver, kube-controller-manager and kubectl; tests/kubernetes/go.mod has the same one.
pub const KUBERNETES: &str = "1.36.3";
/// Version of etcd; tests/kubernetes/go.mod has the same one.
pub const ETCD: &str = "3.6.16";

/// The programs of a set, by the names of their files.
pub const PROGRAMS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"];

/// Their packages, as `go build` names them: etcd's would be called `server`, so it is built by itself.
pub const ETCD_PACKAGE: &str = "go.etcd.io/etcd/server/v3";
/// As [`ETCD_PACKAGE`], of those whose file is named for the package.
pub const KUBERNETES_PACKAGES: [&str; 3] = [
    "k8s.io/kubernetes/cmd/kube-apiserver",
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    "k8s.io/kubernetes/cmd/kubectl",
];

/// Version of Istio's own definitions of its kinds, which ours are compared with; tests/istio/go.mod has the same one.
pub const ISTIO: &str = "v1.31.1";
/// Their module, as Go fetches it.
pub const ISTIO_MODULE: &str = "istio.io/api";
/// Their file in that module.
pub const ISTIO_FILE: &str = "kubernetes/customresourcedefinitions.gen.yaml";

/// Names the directory of a set that is used instead of the built one: what envtest's users have.
pub const VARIABLE: &str = "KUBEBUILDER_ASSETS";

const GO_MOD: &str = include_str!("../../kubernetes/go.mod");
const GO_SUM: &str = include_str!("../../kubernetes/go.sum");

/// The wrapper module, in the checkout that this library was built from.
pub fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes")
}

/// The module that names the version of Istio's definitions, with its checksum.
pub fn istio_module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("istio")
}

/// The package of istiod, in the module that names its version.
pub const ISTIOD_PACKAGE: &str = "istio.io/istio/pilot/cmd/pilot-discovery";

/// The module that names the version of istiod, with the checksums of all that it consists of.
pub fn istiod_module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("istiod")
}

/// Arguments of `go build` for istiod, besides the output and the package.
pub fn istiod_arguments() -> Vec<String> {
    ["-trimpath", "-buildvcs=false", "-ldflags", "-s -w"].map(str::to_owned).to_vec()
}

/// File of istiod, once it is built: the name of its folder says what it was built from and how.
///
/// # Errors
/// There is no cache directory.
pub fn istiod() -> Result<PathBuf> {
    let (go_mod, go_sum) = (include_str!("../../istiod/go.mod"), include_str!("../../istiod/go.sum"));
    let name = format!("istiod-{:016x}", key(&[go_mod, go_sum, &istiod_arguments().join(" ")]));
    Ok(crate::cache().context("where built programs are kept")?.join("tools").join(name).join("istiod"))
}

/// Version of Helm, which renders the chart; tests/helm/go.mod has the same one.
pub const HELM: &str = "v4.3.1";
/// Its package, in the module that names its version.
pub const HELM_PACKAGE: &str = "helm.sh/helm/v4/cmd/helm";

/// The module that names the version of Helm, with the checksums of all that it consists of.
pub fn helm_module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("helm")
}

/// Arguments of `go build` for Helm, besides the output and the package.
pub fn helm_arguments() -> Vec<String> {
    ["-trimpath", "-buildvcs=false", "-ldflags", "-s -w"].map(str::to_owned).to_vec()
}

/// File of Helm, once it is built: the name of its folder says what it was built from and how.
///
/// # Errors
/// There is no cache directory.
pub fn helm() -> Result<PathBuf> {
    let (go_mod, go_sum) = (include_str!("../../helm/go.mod"), include_str!("../../helm/go.sum"));
    let name = format!("helm-{HELM}-{:016x}", key(&[go_mod, go_sum, &helm_arguments().join(" ")]));
    Ok(crate::cache().context("where built programs are kept")?.join("tools").join(name).join("helm"))
}

/// Where Istio's own definitions lie once they have been fetched.
///
/// # Errors
/// There is no cache directory.
pub fn istio_cached() -> Result<PathBuf> {
    let cache = crate::cache().context("where fetched files are kept")?;
    Ok(cache.join("tools").join(format!("istio-api-{ISTIO}.yaml")))
}

/// Istio's own definitions of its kinds: one document for each.
///
/// # Errors
/// They have not been fetched; the error is one line with the remedy.
pub fn istio_definitions() -> Result<String> {
    let path = istio_cached()?;
    std::fs::read_to_string(&path).with_context(|| {
        format!("Istio's own definitions, {}: run `cargo xtask setup`, which fetches them", path.display())
    })
}

/// Arguments of `go build` besides the output and the packages.
///
/// The profile that Kubernetes carries would compile every package a second time; symbols and debug information are half of
/// the size. The version is what `kubectl version` and `/version` say, which clients decide by.
pub fn build_arguments() -> Vec<String> {
    let (major, rest) = KUBERNETES.split_once('.').unwrap_or((KUBERNETES, ""));
    let minor = rest.split('.').next().unwrap_or_default();
    let variables = [
        ("gitVersion", format!("v{KUBERNETES}")),
        ("gitMajor", major.to_owned()),
        ("gitMinor", minor.to_owned()),
        ("gitCommit", "go-module".to_owned()),
        ("gitTreeState", "clean".to_owned()),
        // Not the time of the build: the same sources give the same programs.
        ("buildDate", "2026-01-01T00:00:00Z".to_owned()),
    ];
    let mut linker = "-s -w".to_owned();
    for (name, value) in variables {
        linker.push_str(&format!(" -X k8s.io/component-base/version.{name}={value}"));
    }
    ["-trimpath", "-buildvcs=false", "-pgo=off", "-tags", "notest,grpcnotrace", "-ldflags", linker.as_str()]
        .map(str::to_owned)
        .to_vec()
}

/// A complete set of programs.
#[derive(Debug, Clone)]
pub struct Assets {
    dir: PathBuf,
}

impl Assets {
    /// The set of [`VARIABLE`], else the one that was built into the cache.
    ///
    /// # Errors
    /// A program is missing; the error is one line with the remedy.
    pub fn find() -> Result<Self> {
        if let Some(given) = Self::given()? {
            return Ok(given);
        }
        let dir = Self::cached()?;
        if !missing(&dir).is_empty() {
            bail!(
                "the API server of the tests (Kubernetes {KUBERNETES}, etcd {ETCD}) is not built: run `cargo xtask setup`, or set {VARIABLE} to \
                 a directory that has {}",
                PROGRAMS.join(", ")
            );
        }
        Ok(Self { dir })
    }

    /// The set of [`VARIABLE`]; `None` if that is not set.
    ///
    /// # Errors
    /// It names a directory that lacks a program.
    pub fn given() -> Result<Option<Self>> {
        env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(|dir| Self::of(&dir)).transpose()
    }

    fn of(dir: &OsStr) -> Result<Self> {
        let dir = PathBuf::from(dir);
        let missing = missing(&dir);
        if !missing.is_empty() {
            bail!(
                "{VARIABLE} is {}, which lacks {}: put it there, or unset {VARIABLE} and let `cargo xtask setup` build a set",
                dir.display(),
                missing.join(", ")
            );
        }
        Ok(Self { dir })
    }

    /// Where the built set lies, or will: its name says what it was built from and how.
    ///
    /// # Errors
    /// There is no cache directory.
    pub fn cached() -> Result<PathBuf> {
        let name = format!(
            "kubernetes-{KUBERNETES}-etcd-{ETCD}-{:016x}",
            key(&[GO_MOD, GO_SUM, &build_arguments().join(" ")])
        );
        Ok(crate::cache().context("where built programs are kept")?.join("tools").join(name))
    }

    /// Whether the built set is there.
    ///
    /// # Errors
    /// As [`Self::cached`].
    pub fn is_built() -> Result<bool> {
        Ok(missing(&Self::cached()?).is_empty())
    }

    /// File of a program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Names of the programs that a directory lacks.
fn missing(dir: &Path) -> Vec<&'static str> {
    PROGRAMS.into_iter().filter(|name| !dir.join(name).is_file()).collect()
}

/// A number that differs where one of the texts does (FNV-1a, 64 bit).
pub(crate) fn key(of: &[&str]) -> u64 {
    let bytes = of.iter().flat_map(|text| text.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_and_the_flags_say_the_same_versions() {
        let module = format!("k8s.io/kubernetes v{KUBERNETES}");
        assert!(GO_MOD.lines().any(|line| line.trim().trim_end_matches(" // indirect") == module), "no {module}");
        let etcd = format!("{ETCD_PACKAGE} v{ETCD}");
        assert!(GO_MOD.lines().any(|line| line.trim().trim_end_matches(" // indirect") == etcd), "no {etcd}");
        // What is published beside it has the same number with another major.
        let staging = format!("v0.{}", KUBERNETES.split_once('.').map_or("", |(_, rest)| rest));
        for line in GO_MOD.lines().filter(|line| line.contains("=>")) {
            assert!(line.trim().ends_with(&staging), "{line} is not {staging}");
        }
        let istio = include_str!("../../istio/go.mod");
        assert!(istio.lines().any(|line| line == format!("require {ISTIO_MODULE} {ISTIO}")), "{istio}");
        let (helm, module) = (include_str!("../../helm/go.mod"), HELM_PACKAGE.trim_end_matches("/cmd/helm"));
        for line in [format!("tool {HELM_PACKAGE}"), format!("\t{module} {HELM} // indirect")] {
            assert!(helm.lines().any(|there| there == line), "no {line:?} in {helm}");
        }
        for package in KUBERNETES_PACKAGES.into_iter().chain([ETCD_PACKAGE]) {
            assert!(GO_MOD.lines().any(|line| line.trim() == package), "{package} is no tool of the module");
        }
        let arguments = build_arguments().join(" ");
        let version = format!("gitVersion=v{KUBERNETES} ");
        for part in [version.as_str(), "gitMajor=1 ", "gitMinor=36 ", "-trimpath "] {
            assert!(arguments.contains(part), "{part} is not in {arguments}");
        }
    }

    #[test]
    fn another_text_is_another_key() {
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_ne!(key(&["a"]), key(&["b"]));
        assert_eq!(key(&["a"]), key(&["a"]));
    }

    #[test]
    fn a_given_set_that_lacks_a_program_is_one_line_with_the_remedy() {
        let dir = env::temp_dir().join(format!("culvert-assets-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder for the test");
        for name in ["etcd", "kube-apiserver"] {
            std::fs::write(dir.join(name), "").expect("a file of the test");
        }
        let error = Assets::of(dir.as_os_str()).expect_err("two are missing").to_string();
        assert!(error.contains("lacks kube-controller-manager, kubectl: "), "{error}");
        assert!(error.contains(&format!("{VARIABLE} is {}", dir.display())) && !error.contains('\n'), "{error}");
        for name in PROGRAMS {
            std::fs::write(dir.join(name), "").expect("a file of the test");
        }
        let assets = Assets::of(dir.as_os_str()).expect("all are there");
        assert_eq!(assets.program("kubectl"), dir.join("kubectl"));
        std::fs::remove_dir_all(&dir).expect("the test's own folder");
    }
}
