//! Leaves a node as it was before its first agent: takes every program off, and removes all that is pinned.
//!
//! What refuses goes first: the programs at the devices, then the gate, then those that capture; so there is no moment in which
//! something is captured and nobody is there to judge it. Only what agents put there is touched, whatever directory is named.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use aya::maps::{Array, Map, MapData};
use culvert_common::{LAYOUT_VERSION, SettingsValue};

use super::{
    CGROUP_PROGRAMS, Datapath, POD_LINK, bpffs, gate, ignore_absent,
    owner::{self, FRESH, OWNER, Vacant},
    remove_pins,
    sys::{self, Target},
    veth,
};
use crate::netns::NetnsHandle;

/// How long an agent may take to notice that it is not wanted any more.
const PATIENCE: Duration = Duration::from_secs(3);

/// Removes everything that agents left on this node. `tell` is given one line for each thing that was removed; nothing to
/// remove is success. To be called in the node's own network namespace.
///
/// With `force` an agent that serves is told to drain and end; one that hangs, or is about to serve, is not waited for.
///
/// # Errors
/// An agent serves the node, or prepares itself to; or the first thing that could not be removed, and the rest was tried.
pub fn clean(pin_dir: &Path, force: bool, mut tell: impl FnMut(&str)) -> anyhow::Result<()> {
    if !pin_dir.exists() {
        return Ok(());
    }
    ensure!(
        bpffs::holds(pin_dir)?,
        "{} is not on a bpffs, so no agent has pinned anything there: nothing was removed; see --pin-dir",
        pin_dir.display()
    );
    let vacant = match Vacant::try_take(pin_dir)? {
        Ok(vacant) => Some(vacant),
        Err(occupant) if force => {
            tell(&format!("{occupant}: telling it to end"));
            Vacant::force(pin_dir, PATIENCE)?
        }
        Err(occupant) => bail!(
            "{occupant}: nothing was removed; end it first (kubectl delete daemonset, systemctl stop), or give --force"
        ),
    };
    if vacant.is_none() {
        tell("an agent does not end: going on without it");
    }
    remove(pin_dir, &mut tell)
}

impl Datapath {
    /// As [`clean`], by the agent that has served the node, or was about to: the last thing that it does.
    ///
    /// # Errors
    /// As there; another agent serves, or prepares itself to.
    pub fn clean(&mut self, mut tell: impl FnMut(&str)) -> anyhow::Result<()> {
        ensure!(
            self.owner.is_last(),
            "another agent serves the node, or prepares itself to: what is pinned is its own"
        );
        remove(&self.config.pin_dir, &mut tell)
    }
}

/// What is pinned among the links, in the order in which it is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A program at a device, or its filter.
    Device,
    Gate,
    /// What captures connections.
    Capture,
    /// What judges those that arrive.
    Inbound,
    /// What only looks.
    Rest,
    /// A note about a device that is gone.
    Note,
}

impl Kind {
    /// `None` for what no agent makes.
    fn of(name: &str) -> Option<Self> {
        // What was about to replace another.
        let name = name.strip_suffix("_new").unwrap_or(name);
        let begins =
            |start: &str| name.strip_prefix(start).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        let gate = |program: &str| begins(&format!("{program}_"));
        if begins(veth::LINK) || begins(veth::FILTER) {
            Some(Self::Device)
        } else if begins(veth::PLACE) {
            Some(Self::Note)
        } else if gate::PROGRAMS.iter().any(|(program, _)| gate(program)) {
            Some(Self::Gate)
        } else if begins(POD_LINK) {
            Some(Self::Inbound)
        } else if CGROUP_PROGRAMS.iter().any(|(program, _)| *program == name) {
            let captures = name.starts_with("connect") || name.starts_with("send");
            Some(if captures { Self::Capture } else { Self::Rest })
        } else {
            None
        }
    }
}

fn remove(pin_dir: &Path, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let mut result = remove_links(pin_dir, tell);
    for (name, path) in entries(pin_dir)? {
        let layout = name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok());
        let removed = if layout {
            let maps = entries(&path)?.iter().filter(|(_, path)| !path.is_dir()).count();
            tell(&format!("removing {maps} maps of layout {name}"));
            remove_pins(&path).with_context(|| format!("remove {}", path.display()))
        } else if name == OWNER || name == FRESH {
            ignore_absent(fs::remove_file(&path)).with_context(|| format!("remove {}", path.display()))
        } else if path == owner::links(pin_dir) {
            remove_empty(&path, tell)
        } else {
            Ok(())
        };
        result = result.and(removed);
    }
    result.and(remove_empty(pin_dir, tell))
}

fn remove_links(pin_dir: &Path, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let all = entries(&owner::links(pin_dir))?.into_iter();
    let mut pins: Vec<(Kind, String, PathBuf)> =
        all.filter_map(|(name, path)| Some((Kind::of(&name)?, name, path))).collect();
    pins.sort();
    if pins.iter().any(|(kind, name, _)| *kind == Kind::Device && name.starts_with(veth::FILTER)) {
        is_the_nodes_network(pin_dir)?;
    }
    let mut result = Ok(());
    for (kind, name, path) in pins {
        result = result.and(match take_off(kind, &path) {
            Ok(from) => {
                tell(&format!("took {name} off {from}"));
                Ok(())
            }
            Err(error) => Err(error).with_context(|| format!("take {name} off")),
        });
    }
    result
}

/// Takes a program off what it is at, and unpins it. Gives where it was.
fn take_off(kind: Kind, path: &Path) -> anyhow::Result<String> {
    if kind == Kind::Note {
        ignore_absent(fs::remove_file(path))?;
        return Ok("a device that is gone".to_owned());
    }
    if let Some(pin) = veth::pin(path).filter(|pin| !pin.linked) {
        veth::detach(&pin)?;
        return Ok("the filters of its device".to_owned());
    }
    let at = match sys::open_pinned(path) {
        // What is pinned is a program, not a link: the half of a replacement.
        Ok(link) => match sys::link_info(link.as_fd()) {
            Ok((target, _)) => {
                match sys::link_detach(link.as_fd()) {
                    // What it was at has gone, and the link with it.
                    Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                    other => other?,
                }
                place(target)
            }
            Err(_) => "nothing".to_owned(),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => "nothing".to_owned(),
        Err(error) => return Err(error).context("open what is pinned"),
    };
    ignore_absent(fs::remove_file(path)).context("unpin")?;
    Ok(at)
}

fn place(target: Target) -> String {
    match target {
        Target::Cgroup(0) | Target::Netns(0) | Target::Device(0) => "what is gone".to_owned(),
        Target::Cgroup(id) => format!("cgroup {id}"),
        Target::Netns(inode) => format!("network namespace {inode}"),
        Target::Device(index) => format!("device {index}"),
        Target::Other => "its target".to_owned(),
    }
}

/// Indices of devices mean others elsewhere; a filter that is not found there would stay, and refuse.
fn is_the_nodes_network(pin_dir: &Path) -> anyhow::Result<()> {
    let path = pin_dir.join(format!("v{LAYOUT_VERSION}")).join("SETTINGS");
    let settings =
        MapData::from_pin(path).ok().and_then(|map| Array::<_, SettingsValue>::try_from(Map::Array(map)).ok());
    let Some(settings) = settings.and_then(|map| map.get(&0, 0).ok()).filter(|known| known.host_netns_cookie != 0)
    else {
        // Of an agent of another layout, or of one that did not come so far.
        return Ok(());
    };
    let here = NetnsHandle::current().and_then(|netns| netns.cookie()).context("cookie of the network namespace")?;
    ensure!(
        here == settings.host_netns_cookie,
        "this is not the node's network namespace, whose devices have filters of the agent's: nothing was removed; use \
         hostNetwork, or `nsenter --target 1 --net`"
    );
    Ok(())
}

/// Names and paths of a directory's entries; none if it is not there.
fn entries(dir: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let listed = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("list {}", dir.display()))?,
    };
    let named = listed.map(|entry| entry.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())));
    named.collect::<io::Result<_>>().with_context(|| format!("list {}", dir.display()))
}

/// Removes a directory in which nothing is left.
fn remove_empty(dir: &Path, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let left: Vec<String> = entries(dir)?.into_iter().map(|(name, _)| name).collect();
    ensure!(left.is_empty(), "{} has {}, which is no agent's, and stays", dir.display(), left.join(", "));
    ignore_absent(fs::remove_dir(dir)).with_context(|| format!("remove {}", dir.display()))?;
    tell(&format!("removed {}", dir.display()));
    Ok(())
}
