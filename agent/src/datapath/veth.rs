//! The program for what leaves a pod, at the node's ends of its veths: linked, and pinned, where the kernel has links to
//! devices (Linux 6.6), else a classic filter, whose program is pinned so that the next agent finds the device.
//!
//! Everything here is to be called in the node's network namespace, which the devices' indices are of.

use std::{
    fs, io,
    os::{fd::AsFd as _, unix::fs::symlink},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use aya::programs::loaded_programs;
use culvert_common::VethValue;
use nix::errno::Errno;

use super::{
    Datapath, NetnsCookie, ignore_absent, ignore_missing, owner,
    owner::Part,
    program_fd,
    sys::{self, AttachType, Target},
};
use crate::netns::route::Route;

const PROGRAM: &str = "leaving";
/// Start of the name of a link; the pod's cookie and the device's index follow.
pub(super) const LINK: &str = "leaving_";
/// Start of the name of a program that is attached as a classic filter; likewise.
pub(super) const FILTER: &str = "filter_";
/// Start of the name of a symbolic link that says that the device had no place for filters before; likewise.
pub(super) const PLACE: &str = "place_";

/// A pin of ours.
pub(super) struct Pin {
    path: PathBuf,
    pub(super) linked: bool,
    cookie: NetnsCookie,
    index: u32,
}

impl Datapath {
    /// Says where a prepared pod's frames come into the node; from now on nothing leaves it that was not captured.
    /// `veths` are indices of devices of the namespace that the caller is in. None is right for a pod without a veth, and
    /// where this is switched off.
    ///
    /// # Errors
    /// A full map or a failed attachment.
    pub fn guard(&mut self, cookie: NetnsCookie, veths: &[u32], udp_refused: bool) -> anyhow::Result<()> {
        self.pod_veths.insert(cookie, veths.to_vec());
        self.refuse_udp(cookie, udp_refused)?;
        if self.owner.part() == Part::Serving { self.attach_veths(cookie) } else { Ok(()) }
    }

    pub(super) fn write_veths(&mut self, cookie: NetnsCookie, udp_refused: bool) -> anyhow::Result<()> {
        let value = VethValue { netns_cookie: cookie.0, udp_refused: u8::from(udp_refused), _pad: [0; 7] };
        for index in self.pod_veths.get(&cookie).into_iter().flatten() {
            self.veths.insert(index, value, 0).context("write VETHS (the map holds 32768 devices)")?;
        }
        Ok(())
    }

    /// Attaches the program where the pod has it, and takes it off where an earlier agent had it.
    pub(super) fn attach_veths(&self, cookie: NetnsCookie) -> anyhow::Result<()> {
        let Some(wanted) = self.pod_veths.get(&cookie) else { return Ok(()) };
        for index in wanted {
            self.attach_veth(cookie, *index)
                .with_context(|| format!("attach the program for what leaves the pod to device {index}"))?;
        }
        self.veth_pins()?.iter().filter(|pin| pin.cookie == cookie && !wanted.contains(&pin.index)).try_for_each(detach)
    }

    fn attach_veth(&self, cookie: NetnsCookie, index: u32) -> anyhow::Result<()> {
        let links = owner::links(&self.config.pin_dir);
        let program = program_fd(&self.ebpf, PROGRAM)?;
        let (link, filter) =
            (links.join(format!("{LINK}{}_{index}", cookie.0)), links.join(format!("{FILTER}{}_{index}", cookie.0)));
        match sys::open_pinned(&link) {
            Ok(there) => {
                if sys::link_info(there.as_fd()).context("look at the pinned link")?.0 == Target::Device(index) {
                    return sys::link_update(there.as_fd(), program).context("replace the program of the pinned link");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("open the pinned link"),
        }
        match sys::link_create_at(program, index, AttachType::TcxIngress) {
            Ok(made) => sys::pin_over(made.as_fd(), &link).context("pin the link"),
            // Linux before 6.6 knows no links to devices.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                match Route::here()?.set_ingress(index, program) {
                    Err(error) if error.downcast_ref::<Errno>() == Some(&Errno::ENODEV) => Ok(()),
                    Err(error) => Err(error),
                    Ok(made) => {
                        if made {
                            note_place(&filter).context("note that the device had no place for filters")?;
                        }
                        sys::pin_over(program, &filter).context("pin the filter's program")
                    }
                }
            }
            // Gone with its pod: nothing leaves there.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            Err(error) => Err(error).context("create a link"),
        }
    }

    /// Gives the devices where an earlier agent had the program this agent's, and an entry that refuses where this agent
    /// has none.
    pub(super) fn adopt_veths(&mut self) -> anyhow::Result<()> {
        for pin in self.veth_pins()? {
            if self.pod_veths.contains_key(&pin.cookie) {
                // Seen to with its pod.
                continue;
            }
            if gone(&pin)? {
                ignore_absent(fs::remove_file(place(&pin.path))).context("forget a device")?;
                ignore_absent(fs::remove_file(&pin.path)).with_context(|| format!("unpin {}", pin.path.display()))?;
                continue;
            }
            let value = VethValue { netns_cookie: pin.cookie.0, udp_refused: 1, _pad: [0; 7] };
            self.veths.insert(pin.index, value, 0).context("write VETHS")?;
            self.attach_veth(pin.cookie, pin.index)?;
        }
        Ok(())
    }

    /// How many devices of enrolled pods have another program than this agent's, or none.
    pub(super) fn foreign_veths(&self) -> usize {
        let ours = self.ebpf.program(PROGRAM).and_then(|program| program.info().ok()).map(|info| info.id());
        let links = owner::links(&self.config.pin_dir);
        let has = |cookie: NetnsCookie, index: u32| {
            if let Ok(link) = sys::open_pinned(&links.join(format!("{LINK}{}_{index}", cookie.0))) {
                return match sys::link_info(link.as_fd()) {
                    Ok((Target::Device(0), _)) => true,
                    Ok((_, program)) => Some(program) == ours,
                    Err(_) => false,
                };
            }
            let filter = Route::here().and_then(|mut route| route.ingress(index));
            filter.is_ok_and(|program| program == ours) || !exists(index)
        };
        let wanted = self.pod_veths.iter().flat_map(|(cookie, all)| all.iter().map(|index| (*cookie, *index)));
        wanted.filter(|(cookie, index)| !has(*cookie, *index)).count()
    }

    pub(super) fn remove_veths(&mut self, cookie: NetnsCookie) -> anyhow::Result<()> {
        let mut result = Ok(());
        self.pod_veths.remove(&cookie);
        if self.owner.part() == Part::Serving {
            for pin in self.veth_pins()?.iter().filter(|pin| pin.cookie == cookie) {
                result = result.and(detach(pin));
            }
        }
        let entries = self.veths.iter().filter_map(Result::ok);
        let indices: Vec<u32> =
            entries.filter(|(_, value)| value.netns_cookie == cookie.0).map(|(index, _)| index).collect();
        for index in indices {
            result = result.and(ignore_missing(self.veths.remove(&index)).context("remove from VETHS"));
        }
        result
    }

    fn veth_pins(&self) -> anyhow::Result<Vec<Pin>> {
        let links = owner::links(&self.config.pin_dir);
        let mut pins = Vec::new();
        for entry in fs::read_dir(&links).with_context(|| format!("list {}", links.display()))? {
            let path = entry.context("list pinned links")?.path();
            pins.extend(pin(&path));
        }
        Ok(pins)
    }
}

pub(super) fn pin(path: &Path) -> Option<Pin> {
    let name = path.file_name()?.to_str()?;
    let (linked, rest) = match (name.strip_prefix(LINK), name.strip_prefix(FILTER)) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => return None,
    };
    let (cookie, index) = rest.split_once('_')?;
    Some(Pin { path: path.to_owned(), linked, cookie: NetnsCookie(cookie.parse().ok()?), index: index.parse().ok()? })
}

/// Whether the device has gone, or the filter with it.
fn gone(pin: &Pin) -> anyhow::Result<bool> {
    if !pin.linked {
        return Ok(Route::here()?.ingress(pin.index)?.is_none());
    }
    let link = sys::open_pinned(&pin.path).with_context(|| format!("open {}", pin.path.display()))?;
    let (target, _) = sys::link_info(link.as_fd()).with_context(|| format!("look at {}", pin.path.display()))?;
    Ok(target != Target::Device(pin.index))
}

/// Whether there is such a device in the calling thread's namespace.
fn exists(index: u32) -> bool {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer is as long as the function wants.
    !unsafe { libc::if_indextoname(index, name.as_mut_ptr()) }.is_null()
}

/// Takes the program off the device, and unpins it.
pub(super) fn detach(pin: &Pin) -> anyhow::Result<()> {
    let result = if pin.linked {
        let detached = sys::open_pinned(&pin.path).and_then(|link| sys::link_detach(link.as_fd()));
        match detached {
            // The device has gone, and the link with it.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
            other => ignore_absent(other).context("detach the program for what leaves the pod"),
        }
    } else {
        unfilter(pin)
    };
    result.and(ignore_absent(fs::remove_file(&pin.path)).context("unpin the program for what leaves the pod"))
}

/// Removes the classic filter, if the one that is there has one of our programs: the device's index may be another's now.
fn unfilter(pin: &Pin) -> anyhow::Result<()> {
    let mut route = Route::here()?;
    if let Some(id) = route.ingress(pin.index)? {
        let of = |info: aya::programs::ProgramInfo| info.id() == id && info.name_as_str() == Some(PROGRAM);
        if !loaded_programs().filter_map(Result::ok).any(of) {
            return Ok(());
        }
        route.remove_ingress(pin.index)?;
        if fs::symlink_metadata(place(&pin.path)).is_ok() {
            route.remove_place(pin.index)?;
        }
    }
    ignore_absent(fs::remove_file(place(&pin.path))).context("forget that the device had no place for filters")
}

fn note_place(filter: &Path) -> io::Result<()> {
    match symlink("made", place(filter)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// What says of a filter's device that it had no place for filters.
fn place(filter: &Path) -> PathBuf {
    let name = filter.file_name().and_then(|name| name.to_str()?.strip_prefix(FILTER)).unwrap_or_default();
    filter.with_file_name(format!("{PLACE}{name}"))
}
