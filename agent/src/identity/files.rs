//! Certificates from a folder instead of the CA, for machines without one.
//!
//! ```text
//! <cert-dir>/root-cert.pem                                    all roots
//! <cert-dir>/<namespace>/<service account>/cert-chain.pem     leaf, then intermediates
//! <cert-dir>/<namespace>/<service account>/key.pem            its private key: PKCS#8, SEC1 or PKCS#1
//! ```
//!
//! A change is noticed by inotify on the folders, so it does not matter whether a file is written in place, renamed over,
//! or reached through a symbolic link that is swapped (as in a mounted Secret). What is read passes the same checks as an
//! answer of the CA; what does not pass leaves the certificate before it in force.

use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use futures_util::{FutureExt, StreamExt};
use inotify::{EventStream, Inotify, WatchMask};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use tracing::warn;

use super::certificate::{Answer, certificates};
use crate::model::SpiffeId;

/// Reads what the folder has for `identity`.
pub(super) async fn read(dir: &Path, identity: &SpiffeId) -> anyhow::Result<Answer> {
    let roots_file = dir.join("root-cert.pem");
    let folder = folder(dir, identity)?;
    let chain_file = folder.join("cert-chain.pem");
    let key_file = folder.join("key.pem");
    let roots = certificates(&load(&roots_file).await?).with_context(|| format!("in {}", roots_file.display()))?;
    let chain = certificates(&load(&chain_file).await?).with_context(|| format!("in {}", chain_file.display()))?;
    let key = PrivateKeyDer::from_pem_slice(&load(&key_file).await?)
        .map_err(|error| anyhow::anyhow!("no private key in {}: {error}", key_file.display()))?;
    if let Ok(metadata) = tokio::fs::metadata(&key_file).await {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            warn!(file = %key_file.display(), mode = format!("{mode:o}"),
                "a private key is open to others than its owner; chmod 600 it");
        }
    }
    Ok(Answer { chain, key, roots })
}

async fn load(path: &Path) -> anyhow::Result<Vec<u8>> {
    tokio::fs::read(path).await.with_context(|| format!("read {}", path.display()))
}

fn folder(dir: &Path, identity: &SpiffeId) -> anyhow::Result<PathBuf> {
    for name in [&identity.namespace, &identity.service_account] {
        if name.is_empty() || &**name == "." || &**name == ".." || name.contains('/') {
            bail!("{name:?} of {identity} cannot name a folder");
        }
    }
    Ok(dir.join(&*identity.namespace).join(&*identity.service_account))
}

/// Tells when something in the folder changed.
pub(super) struct Watch {
    dir: PathBuf,
    stream: EventStream<[u8; 4096]>,
}

impl Watch {
    /// Watches `dir`.
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        let inotify =
            Inotify::init().context("inotify_init; raise fs.inotify.max_user_instances if it is exhausted")?;
        inotify.watches().add(dir, MASK).with_context(|| format!("watch the certificate folder {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned(), stream: inotify.into_event_stream([0; 4096]).context("read inotify events")? })
    }

    /// Watches the folders of `identities` too, as far as they exist. Where one does not, a change of the folder above
    /// it is the sign to come again.
    pub(super) fn cover(&self, identities: &BTreeSet<SpiffeId>) {
        let mut watches = self.stream.watches();
        let mut add = |path: &Path| match watches.add(path, MASK) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => warn!(folder = %path.display(), %error, "cannot watch a certificate folder"),
        };
        // From the top down: what appears after its parent is watched makes an event.
        add(&self.dir);
        for identity in identities {
            if let Ok(folder) = folder(&self.dir, identity) {
                add(&self.dir.join(&*identity.namespace));
                add(&folder);
            }
        }
    }

    /// Forgets the changes so far; what is read from now on has them.
    pub(super) fn drain(&mut self) {
        while let Some(Some(Ok(_))) = self.stream.next().now_or_never() {}
    }

    /// Returns after the next change. Safe to drop half-way.
    pub(super) async fn changed(&mut self) {
        match self.stream.next().await {
            Some(Ok(_)) => {}
            // Neither happens while the descriptor is open; waiting is better than spinning.
            Some(Err(error)) => {
                warn!(%error, "cannot read inotify events of the certificate folder");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
            None => std::future::pending().await,
        }
    }
}

const MASK: WatchMask = WatchMask::CREATE
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::MOVED_TO)
    .union(WatchMask::MOVED_FROM)
    .union(WatchMask::DELETE)
    .union(WatchMask::ONLYDIR);
