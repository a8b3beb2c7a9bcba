//! Container images without a registry: an OCI image layout (image-spec 1.0) in one tar archive, the same bytes each time.
//!
//! The archive is what `ctr images import`, `podman load`, `docker load` and `kind load image-archive` read. It has one layer,
//! not compressed. No time and no owner is in it, entries are sorted and modes are given, so its digest follows from the
//! contents. Files stay on disk: each is read twice, once to know its digest and once to be packed.

pub mod culvert;
mod name;
mod tar;

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use aws_lc_rs::digest;
use serde::Serialize;

pub use name::Name;

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
/// Some readers want a time; it is that of the files.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// An image that is being put together. Nothing is looked at before [`Image::write`].
#[derive(Debug, Clone)]
#[must_use]
pub struct Image {
    names: Vec<String>,
    architecture: Option<String>,
    entries: Vec<(String, Entry)>,
    run: Run,
}

#[derive(Debug, Clone)]
enum Entry {
    Directory { mode: u32 },
    File { on_host: PathBuf, mode: u32 },
    Bytes { bytes: Vec<u8>, mode: u32 },
    Symlink { target: String },
}

impl Image {
    /// An empty image called `name`, `NAME:TAG`, for this machine's architecture.
    pub fn new(name: &str) -> Self {
        Self { names: vec![name.to_owned()], architecture: None, entries: Vec::new(), run: Run::default() }
    }

    /// One more name for the same image.
    pub fn name(mut self, name: &str) -> Self {
        self.names.push(name.to_owned());
        self
    }

    /// The architecture, in Go's words: `amd64`, `arm64`.
    pub fn architecture(mut self, architecture: &str) -> Self {
        self.architecture = Some(architecture.to_owned());
        self
    }

    /// The file `on_host` as `path`, an absolute path in the image. Directories above it that are not named are made, 0755.
    pub fn file(self, on_host: impl Into<PathBuf>, path: &str, mode: u32) -> Self {
        self.entry(path, Entry::File { on_host: on_host.into(), mode })
    }

    /// A file with these contents.
    pub fn bytes(self, bytes: impl Into<Vec<u8>>, path: &str, mode: u32) -> Self {
        self.entry(path, Entry::Bytes { bytes: bytes.into(), mode })
    }

    /// A directory of its own mode.
    pub fn directory(self, path: &str, mode: u32) -> Self {
        self.entry(path, Entry::Directory { mode })
    }

    /// A symbolic link at `path` to `target`, which is kept as it is written.
    pub fn symlink(self, target: &str, path: &str) -> Self {
        self.entry(path, Entry::Symlink { target: target.to_owned() })
    }

    fn entry(mut self, path: &str, entry: Entry) -> Self {
        self.entries.push((path.to_owned(), entry));
        self
    }

    /// What is run, with its first arguments.
    pub fn entrypoint<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.run.entrypoint = words.into_iter().map(Into::into).collect();
        self
    }

    /// Arguments that a pod's `args` replace.
    pub fn cmd<S: Into<String>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.run.cmd = words.into_iter().map(Into::into).collect();
        self
    }

    /// One more variable of the environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.run.env.push(format!("{name}={value}"));
        self
    }

    /// Who runs it: a user's name or number, also `USER:GROUP`.
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.run.user);
        self
    }

    /// Where it runs.
    pub fn working_dir(mut self, path: &str) -> Self {
        path.clone_into(&mut self.run.working_dir);
        self
    }

    /// One more label.
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.run.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Writes the archive as `out` and returns the digest of its manifest, by which a runtime knows the image.
    ///
    /// An archive that was there is replaced when the new one is complete.
    ///
    /// # Errors
    /// A name, a path or the architecture cannot be used, two entries have one path, a file cannot be read or changed meanwhile,
    /// or `out` cannot be written. The error names the place.
    pub fn write(&self, out: &Path) -> Result<Digest> {
        let part = part(out)?;
        let written = self.write_to(&part).and_then(|digest| {
            fs::rename(&part, out)?;
            Ok(digest)
        });
        if written.is_err() {
            // It may not have been made.
            let _ = fs::remove_file(&part);
        }
        written.with_context(|| format!("write the image {}", out.display()))
    }

    fn write_to(&self, out: &Path) -> Result<Digest> {
        let names = self.names.iter().map(|name| Name::parse(name)).collect::<Result<Vec<_>>>()?;
        let layer = Layer(self.tree()?);
        let layer = Blob { of: layer.descriptor()?, contents: Contents::Layer(layer) };
        let config = self.config(&layer.of)?;
        let manifest = json(
            MANIFEST_TYPE,
            &Manifest { schema: 2, media_type: MANIFEST_TYPE, config: config.of.clone(), layers: [layer.of.clone()] },
        )?;
        let digest = manifest.of.digest.clone();
        let index = index(&names, &manifest.of)?;
        let docker = serde_json::to_vec(&[Docker {
            config: blob_path(&config.of.digest),
            repo_tags: names.iter().map(ToString::to_string).collect(),
            layers: [blob_path(&layer.of.digest)],
        }])?;
        let mut blobs = [layer, config, manifest];
        blobs.sort_by(|a, b| a.of.digest.cmp(&b.of.digest));

        let file = File::create(out)?;
        let mut archive = tar::Writer::new(BufWriter::with_capacity(1 << 18, file));
        archive.directory("blobs", 0o755)?;
        archive.directory("blobs/sha256", 0o755)?;
        for blob in &blobs {
            archive.file(&blob_path(&blob.of.digest), 0o644, blob.of.size, |to| blob.copy(to))?;
        }
        for (path, bytes) in [
            ("index.json", index.as_slice()),
            ("manifest.json", &docker),
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ] {
            archive.file(path, 0o644, bytes.len() as u64, |to| Ok(to.write_all(bytes)?))?;
        }
        archive.finish()?.flush()?;
        Ok(digest)
    }

    fn config(&self, layer: &Descriptor) -> Result<Blob> {
        let architecture = match &self.architecture {
            Some(architecture) => architecture,
            None => architecture_of(ARCH)?,
        };
        json(
            CONFIG_TYPE,
            &Config {
                created: CREATED,
                architecture,
                os: "linux",
                config: &self.run,
                rootfs: RootFs { kind: "layers", diff_ids: [layer.digest.clone()] },
            },
        )
    }

    /// Every entry by its path without the first slash, with the directories above it: sorted, a directory comes before what is
    /// in it.
    fn tree(&self) -> Result<BTreeMap<String, Entry>> {
        let mut tree = BTreeMap::new();
        for (path, entry) in &self.entries {
            let relative = path.strip_prefix('/').with_context(|| format!("{path}: a path in an image is absolute"))?;
            ensure!(
                relative.split('/').all(|part| !matches!(part, "" | "." | "..")) && !relative.contains('\0'),
                "{path}: a path in an image has no empty part, no `.`, no `..` and no NUL"
            );
            ensure!(tree.insert(relative.to_owned(), entry.clone()).is_none(), "{path} is in the image twice");
        }
        let above = |path: &String| path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect::<Vec<_>>();
        for directory in tree.keys().flat_map(above).collect::<Vec<_>>() {
            let place = format!("/{directory} is not a directory in the image, and something lies below it");
            let entry = tree.entry(directory).or_insert(Entry::Directory { mode: 0o755 });
            ensure!(matches!(entry, Entry::Directory { .. }), "{place}");
        }
        Ok(tree)
    }
}

/// The word for an architecture in an image, from Rust's word for it.
///
/// # Errors
/// It is neither x86_64 nor aarch64.
pub fn architecture_of(machine: &str) -> Result<&'static str> {
    match machine {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        _ => bail!("images are made for x86_64 and aarch64, not for {machine}"),
    }
}

/// A SHA-256, shown as `sha256:` and 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "String")]
pub struct Digest {
    hex: String,
}

impl Digest {
    /// The digits alone.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Passes bytes on, and knows what they were.
struct Measure<W> {
    to: W,
    sum: digest::Context,
    bytes: u64,
}

impl<W: Write> Measure<W> {
    fn new(to: W) -> Self {
        Self { to, sum: digest::Context::new(&digest::SHA256), bytes: 0 }
    }

    fn finish(self) -> (Digest, u64) {
        let mut hex = String::with_capacity(64);
        for byte in self.sum.finish().as_ref() {
            write!(hex, "{byte:02x}").expect("a string takes what is written to it");
        }
        (Digest { hex }, self.bytes)
    }
}

impl<W: Write> Write for Measure<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.sum.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The files of an image, as its only layer has them.
struct Layer(BTreeMap<String, Entry>);

impl Layer {
    fn descriptor(&self) -> Result<Descriptor> {
        let mut measure = Measure::new(io::sink());
        self.copy(&mut measure)?;
        let (digest, size) = measure.finish();
        Ok(Descriptor { media_type: LAYER_TYPE, digest, size })
    }

    fn copy(&self, to: impl Write) -> Result<()> {
        let mut archive = tar::Writer::new(to);
        for (path, entry) in &self.0 {
            match entry {
                Entry::Directory { mode } => archive.directory(path, *mode)?,
                Entry::Symlink { target } => archive.symlink(path, target)?,
                Entry::Bytes { bytes, mode } => {
                    archive.file(path, *mode, bytes.len() as u64, |to| Ok(to.write_all(bytes)?))?;
                }
                Entry::File { on_host, mode } => {
                    let shown = || format!("pack {}", on_host.display());
                    let file = File::open(on_host).with_context(shown)?;
                    let metadata = file.metadata().with_context(shown)?;
                    ensure!(metadata.is_file(), "pack {}: it is not a file", on_host.display());
                    let size = metadata.len();
                    let fill = |to: &mut dyn Write| Ok(io::copy(&mut file.take(size), to).map(|_| ())?);
                    archive.file(path, *mode, size, fill).with_context(shown)?;
                }
            }
        }
        archive.finish()?;
        Ok(())
    }
}

/// One of the archive's contents that are known by their digest.
struct Blob {
    of: Descriptor,
    contents: Contents,
}

enum Contents {
    Layer(Layer),
    Bytes(Vec<u8>),
}

impl Blob {
    fn copy(&self, to: &mut dyn Write) -> Result<()> {
        match &self.contents {
            Contents::Bytes(bytes) => Ok(to.write_all(bytes)?),
            Contents::Layer(layer) => {
                let mut measure = Measure::new(to);
                layer.copy(&mut measure)?;
                ensure!(measure.finish().0 == self.of.digest, "a file changed while it was packed: do it again");
                Ok(())
            }
        }
    }
}

fn json(media_type: &'static str, value: &impl Serialize) -> Result<Blob> {
    let bytes = serde_json::to_vec(value)?;
    let mut measure = Measure::new(io::sink());
    measure.write_all(&bytes)?;
    let (digest, size) = measure.finish();
    Ok(Blob { of: Descriptor { media_type, digest, size }, contents: Contents::Bytes(bytes) })
}

/// `index.json`: the one manifest, under each of its names.
///
/// containerd takes the whole name from its own annotation; the other one, by the specification, is for the tag.
fn index(names: &[Name], manifest: &Descriptor) -> Result<Vec<u8>> {
    let named = |name: &Name| Named {
        descriptor: manifest.clone(),
        annotations: BTreeMap::from([
            ("io.containerd.image.name", name.to_string()),
            ("org.opencontainers.image.ref.name", name.tag().to_owned()),
        ]),
    };
    Ok(serde_json::to_vec(&Index { schema: 2, media_type: INDEX_TYPE, manifests: names.iter().map(named).collect() })?)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex)
}

/// Where an archive lies until it is complete.
fn part(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("{} names no file to write", out.display()))?;
    let mut part = name.to_owned();
    part.push(".part");
    Ok(out.with_file_name(part))
}

// The documents of the image specification. Fields are written in this order, whatever serde_json was built with.

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: &'static str,
    digest: Digest,
    size: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(rename = "schemaVersion")]
    schema: u32,
    media_type: &'static str,
    config: Descriptor,
    layers: [Descriptor; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    #[serde(rename = "schemaVersion")]
    schema: u32,
    media_type: &'static str,
    manifests: Vec<Named>,
}

#[derive(Serialize)]
struct Named {
    #[serde(flatten)]
    descriptor: Descriptor,
    annotations: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Config<'a> {
    created: &'static str,
    architecture: &'a str,
    os: &'static str,
    config: &'a Run,
    rootfs: RootFs,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Run {
    #[serde(skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    env: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    entrypoint: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cmd: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    working_dir: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: [Digest; 1],
}

/// `manifest.json`, from before there was a specification: for docker, and for podman (4.3), which takes a layout of several
/// names from it only.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Docker {
    config: String,
    repo_tags: Vec<String>,
    layers: [String; 1],
}

#[cfg(test)]
mod tests;
