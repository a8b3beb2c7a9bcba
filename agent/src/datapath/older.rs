//! The sockets that were open when their pod was brought in: nobody captured them, and nobody had to.
//!
//! They are in a map that every agent finds again, because a later one could not tell them from sockets that got past the mesh.
//! What is made of them is for `connections`.

use std::path::Path;

use anyhow::Context as _;
use aya::maps::{HashMap as BpfHashMap, IterableMap as _, Map, MapData};
use culvert_common::OlderKey;

use super::{NetnsCookie, ignore_missing};

/// The sockets that are older than the mesh, by pod.
pub struct Older {
    map: BpfHashMap<MapData, OlderKey, u32>,
}

impl Older {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let map = MapData::from_pin(path).context("open OLDER")?;
        Ok(Self { map: Map::HashMap(map).try_into().context("open OLDER")? })
    }

    /// Whether a pod's sockets are noted, by this agent or by one before it.
    pub fn knows(&self, pod: NetnsCookie) -> bool {
        self.has(pod, 0)
    }

    /// Notes the sockets, by cookie, that are open in a pod which has just been brought in.
    ///
    /// # Errors
    /// A full map: those that are not noted will be told as connections that the mesh has not made.
    pub fn note(&mut self, pod: NetnsCookie, sockets: impl Iterator<Item = u64>) -> anyhow::Result<()> {
        for socket in sockets.chain([0]) {
            let key = OlderKey { netns_cookie: pod.0, socket_cookie: socket };
            self.map.insert(key, 1, 0).context("write OLDER (the map holds 65536 sockets)")?;
        }
        Ok(())
    }

    /// Whether the mesh was not there yet when this socket was opened.
    pub fn has(&self, pod: NetnsCookie, socket: u64) -> bool {
        self.map.get(&OlderKey { netns_cookie: pod.0, socket_cookie: socket }, 0).is_ok()
    }

    pub(super) fn entries(&self) -> usize {
        self.map.keys().count()
    }

    pub(super) fn map(&self) -> &MapData {
        self.map.map()
    }

    /// Forgets pods that are not among these.
    ///
    /// # Errors
    /// The first entry that could not be removed; the others are.
    pub(super) fn keep(&mut self, is_there: impl Fn(NetnsCookie) -> bool) -> anyhow::Result<()> {
        let gone = |key: &OlderKey| !is_there(NetnsCookie(key.netns_cookie));
        let gone: Vec<OlderKey> = self.map.keys().filter_map(Result::ok).filter(gone).collect();
        let mut result = Ok(());
        for key in gone {
            result = result.and(ignore_missing(self.map.remove(&key)).context("remove from OLDER"));
        }
        result
    }
}
