//! The devices of a network namespace and the classic filters at them, asked of the kernel by netlink (rtnetlink(7)).
//!
//! Layouts: linux/rtnetlink.h, linux/if_link.h, linux/pkt_cls.h.

use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike},
    },
};

use super::{
    NetnsHandle,
    sock_diag::{attributes, error_of, messages, u32_at},
};

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its index, which is unique in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind, as `ip -details link` shows it: `veth`, `dummy`; empty for hardware and loopback.
    pub kind: String,
    /// Index of the device that it belongs to: for a veth, of the other end in *its* namespace; 0 for none.
    pub link: u32,
    /// The number by which this namespace knows the other end's, where that is another (ip-netns(8), `list-id`).
    pub link_netns: Option<u32>,
    /// `IFF_*`.
    pub flags: u32,
}

/// Where a pod's frames come into the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// Indices of the devices at the node's ends of the pod's veths.
    pub veths: Vec<u32>,
    /// Names of the pod's devices that are up and have no such end: SR-IOV, host-device, IPVLAN, macvlan.
    pub others: Vec<String>,
}

/// A netlink socket in one namespace; it works from every thread.
#[derive(Debug)]
pub struct Route {
    socket: OwnedFd,
    seq: u32,
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLA_F_NESTED: u16 = 1 << 15;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// `TC_H_CLSACT`, its own handle, its ingress and its egress.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const ETH_P_ALL: u16 = 3;
/// The first of all filters, among them by a number that others do not use (Cilium has 1): at the same priority each
/// stays, the youngest is asked first, and what we do not stop goes on to the next.
const PRIORITY: u32 = 1;
const HANDLE: u32 = 0x6375;
/// `struct ifinfomsg`, `struct tcmsg`, and `struct rtgenmsg` with its padding.
const IFINFO_BYTES: usize = 16;
const GENMSG_BYTES: usize = 4;
const TCMSG_BYTES: usize = 20;
/// More than the kernel puts into one message of a list.
const BUFFER_BYTES: usize = 64 << 10;

impl Route {
    /// Opens a netlink socket in a namespace.
    ///
    /// # Errors
    /// The namespace could not be entered, or no descriptor is left.
    pub fn open(netns: &NetnsHandle) -> anyhow::Result<Self> {
        netns.run(Self::here).context("enter the network namespace for rtnetlink")?
    }

    /// Opens a netlink socket in the namespace that the calling thread is in.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn here() -> anyhow::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
            .context("open a netlink socket (NETLINK_ROUTE)")?;
        // The kernel answers in the same system call; the time-out only keeps a kernel bug from hanging us.
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(5)).context("set the time-out of a netlink socket")?;
        Ok(Self { socket, seq: 0 })
    }

    /// Lists the devices.
    ///
    /// # Errors
    /// The kernel refused, or a message was cut off.
    pub fn devices(&mut self) -> anyhow::Result<Vec<Device>> {
        let mut request = self.request(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP);
        request.extend([0; IFINFO_BYTES]);
        let mut devices = Vec::new();
        self.talk(request, |kind, payload| {
            if kind == RTM_NEWLINK {
                devices.push(device(payload)?);
            }
            Ok(())
        })
        .context("list network devices (rtnetlink)")?;
        Ok(devices)
    }

    /// The number by which this namespace knows another; `None` where it has none for it, so that no device here is joined
    /// to one there.
    fn netns_id(&mut self, other: BorrowedFd<'_>) -> anyhow::Result<Option<u32>> {
        let mut request = self.request(RTM_GETNSID, NLM_F_REQUEST | NLM_F_ACK);
        request.extend([0; GENMSG_BYTES]);
        attribute(&mut request, NETNSA_FD, &other.as_raw_fd().to_ne_bytes());
        let mut id = None;
        self.talk(request, |kind, payload| {
            if kind == RTM_NEWNSID {
                let mut answered = attributes(payload.get(GENMSG_BYTES..).unwrap_or_default());
                id = answered.find(|(kind, _)| *kind == NETNSA_NSID).and_then(|(_, value)| u32_at(value, 0));
            }
            Ok(())
        })
        .context("ask for the number of a network namespace (rtnetlink)")?;
        // -1: not assigned.
        Ok(id.filter(|id| *id != u32::MAX))
    }

    /// Puts a program first among the ingress filters of a device, over an earlier one of ours. Gives whether the device had
    /// no place for filters until now: [`Route::remove_place`] then takes it away again.
    ///
    /// # Errors
    /// The kernel refused: no CAP_NET_ADMIN, no such device, or no clsact (module sch_ingress).
    pub fn set_ingress(&mut self, index: u32, prog: BorrowedFd<'_>) -> anyhow::Result<bool> {
        self.set_filter(index, HANDLE, prog)
    }

    fn set_filter(&mut self, index: u32, handle: u32, prog: BorrowedFd<'_>) -> anyhow::Result<bool> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut request = self.tc(RTM_NEWQDISC, flags, index, (CLSACT_HANDLE, CLSACT, 0));
        attribute(&mut request, TCA_KIND, b"clsact\0");
        let made = match self.talk(request, |_, _| Ok(())) {
            Err(error) if error.downcast_ref::<Errno>() == Some(&Errno::EEXIST) => false,
            other => other.map(|()| true).with_context(|| format!("add clsact to device {index}"))?,
        };
        let mut request = self.filter(RTM_NEWTFILTER, NLM_F_ACK | NLM_F_CREATE, index, handle);
        let mut options = Vec::new();
        attribute(&mut options, TCA_BPF_FD, &prog.as_raw_fd().to_ne_bytes());
        attribute(&mut options, TCA_BPF_NAME, b"culvert\0");
        attribute(&mut options, TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
        attribute(&mut request, TCA_OPTIONS | NLA_F_NESTED, &options);
        self.talk(request, |_, _| Ok(())).with_context(|| format!("set the ingress filter of device {index}"))?;
        Ok(made)
    }

    /// The id of the program that [`Route::set_ingress`] has put at a device; `None` if there is none.
    ///
    /// # Errors
    /// The kernel refused for another reason than that there is no such filter or device.
    pub fn ingress(&mut self, index: u32) -> anyhow::Result<Option<u32>> {
        self.filter_at(index, HANDLE)
    }

    fn filter_at(&mut self, index: u32, handle: u32) -> anyhow::Result<Option<u32>> {
        let request = self.filter(RTM_GETTFILTER, NLM_F_ACK, index, handle);
        let mut id = None;
        let result = self.talk(request, |kind, payload| {
            if kind == RTM_NEWTFILTER {
                let options = attributes(payload.get(TCMSG_BYTES..).unwrap_or_default());
                let options = options.filter(|(kind, _)| *kind == TCA_OPTIONS).flat_map(|(_, value)| attributes(value));
                id = options.filter(|(kind, _)| *kind == TCA_BPF_ID).find_map(|(_, value)| u32_at(value, 0)).or(id);
            }
            Ok(())
        });
        absent(result).with_context(|| format!("look at the ingress filter of device {index}"))?;
        Ok(id)
    }

    /// Removes what [`Route::set_ingress`] has put; that it is gone already is no error.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn remove_ingress(&mut self, index: u32) -> anyhow::Result<()> {
        let request = self.filter(RTM_DELTFILTER, NLM_F_ACK, index, HANDLE);
        absent(self.talk(request, |_, _| Ok(())))
            .with_context(|| format!("remove the ingress filter of device {index}"))
    }

    /// Removes the place for filters of a device (clsact), if there is no filter at it; that it is gone already is no error.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn remove_place(&mut self, index: u32) -> anyhow::Result<()> {
        for parent in [CLSACT_INGRESS, CLSACT_EGRESS] {
            let request = self.tc(RTM_GETTFILTER, NLM_F_REQUEST | NLM_F_DUMP, index, (0, parent, 0));
            let mut filters = 0;
            let listed = self.talk(request, |kind, _| {
                filters += usize::from(kind == RTM_NEWTFILTER);
                Ok(())
            });
            absent(listed).with_context(|| format!("list the filters of device {index}"))?;
            if filters > 0 {
                return Ok(());
            }
        }
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut request = self.tc(RTM_DELQDISC, flags, index, (CLSACT_HANDLE, CLSACT, 0));
        attribute(&mut request, TCA_KIND, b"clsact\0");
        absent(self.talk(request, |_, _| Ok(()))).with_context(|| format!("remove clsact from device {index}"))
    }

    fn filter(&mut self, kind: u16, flags: u16, index: u32, handle: u32) -> Vec<u8> {
        let info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
        let mut request = self.tc(kind, NLM_F_REQUEST | flags, index, (handle, CLSACT_INGRESS, info));
        attribute(&mut request, TCA_KIND, b"bpf\0");
        request
    }

    fn tc(&mut self, kind: u16, flags: u16, index: u32, (handle, parent, info): (u32, u32, u32)) -> Vec<u8> {
        let mut request = self.request(kind, flags);
        for word in [0, index, handle, parent, info] {
            request.extend(word.to_ne_bytes());
        }
        request
    }

    fn request(&mut self, kind: u16, flags: u16) -> Vec<u8> {
        self.seq = self.seq.wrapping_add(1);
        let mut request = Vec::with_capacity(128);
        request.extend(0u32.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(flags.to_ne_bytes());
        request.extend(self.seq.to_ne_bytes());
        request.extend(0u32.to_ne_bytes());
        request
    }

    /// Sends a request and takes the answers until the last.
    fn talk(&self, mut request: Vec<u8>, mut take: impl FnMut(u16, &[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let length = u32::try_from(request.len()).context("length of a netlink request")?;
        request[..4].copy_from_slice(&length.to_ne_bytes());
        while let Err(errno) = send(self.socket.as_raw_fd(), &request, MsgFlags::empty()) {
            ensure!(errno == Errno::EINTR, errno);
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let received = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context("receive from netlink"),
            };
            ensure!(received <= buffer.len(), "a netlink message of {received} bytes was cut off");
            for message in messages(&buffer[..received]).filter(|message| message.seq == self.seq) {
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match error_of(message.payload) {
                            None => Ok(()),
                            Some(errno) => bail!(errno),
                        };
                    }
                    kind => take(kind, message.payload)?,
                }
            }
        }
    }
}

/// Finds the node's ends of a pod's veths. A device of the pod that is up and is not joined to the node's namespace by a veth
/// is named.
///
/// # Errors
/// A namespace's devices could not be listed.
pub fn ends(pod: &NetnsHandle, node: &NetnsHandle) -> anyhow::Result<Ends> {
    let inside = Route::open(pod)?.devices()?;
    let mut there = Route::open(node)?;
    // Listing them gives a number to each namespace that one is joined to.
    let outside = there.devices()?;
    let pod = there.netns_id(pod.as_fd())?;
    Ok(matched(&inside, &outside, pod))
}

/// Indices alone say nothing: a pod with CAP_NET_ADMIN can make a pair of its own with those of another pod's.
fn matched(inside: &[Device], outside: &[Device], pod: Option<u32>) -> Ends {
    let mut ends = Ends::default();
    for device in inside {
        let (up, loopback) = (device.flags & libc::IFF_UP as u32 != 0, device.flags & libc::IFF_LOOPBACK as u32 != 0);
        let joined = |other: &&Device| {
            let veths = device.kind == "veth" && other.kind == "veth";
            let indices = other.index == device.link && other.link == device.index;
            veths && indices && pod.is_some() && other.link_netns == pod
        };
        match outside.iter().find(joined) {
            Some(other) => ends.veths.push(other.index),
            None if up && !loopback => ends.others.push(device.name.clone()),
            None => {}
        }
    }
    ends
}

fn device(message: &[u8]) -> anyhow::Result<Device> {
    let word = |at| u32_at(message, at).context("a message about a device is too short");
    let mut device = Device {
        index: word(4)?,
        name: String::new(),
        kind: String::new(),
        link: 0,
        link_netns: None,
        flags: word(8)?,
    };
    for (kind, value) in attributes(message.get(IFINFO_BYTES..).unwrap_or_default()) {
        match kind {
            IFLA_IFNAME => device.name = text(value),
            IFLA_LINK => device.link = u32_at(value, 0).unwrap_or(0),
            IFLA_LINK_NETNSID => device.link_netns = u32_at(value, 0),
            IFLA_LINKINFO => {
                device.kind = attributes(value)
                    .find(|(kind, _)| *kind == IFLA_INFO_KIND)
                    .map(|(_, value)| text(value))
                    .unwrap_or_default();
            }
            _ => {}
        }
    }
    Ok(device)
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// No such filter, qdisc or device.
fn absent(result: anyhow::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.downcast_ref::<Errno>(),
                Some(Errno::ENOENT | Errno::ENODEV | Errno::EINVAL | Errno::ENXIO)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::testing::{new_netns, program};

    #[test]
    fn the_nodes_end_of_a_pods_veth_is_found() {
        let (pod, node) = (new_netns(), new_netns());
        let ip = |words: &str| {
            let status = node.run(|| std::process::Command::new("ip").args(words.split(' ')).status());
            assert!(status.expect("enter").expect("start ip").success(), "{words}");
        };
        let empty = ends(&pod, &node).expect("listed");
        assert_eq!(empty, Ends::default(), "only lo");
        ip("link add outer type veth peer name inner");
        ip("link add more type veth peer name rest");
        let index = |name: &str| {
            let devices = Route::open(&node).expect("opened").devices().expect("listed");
            devices.into_iter().find(|device| device.name == name).expect("made above").index
        };
        let outer = index("outer");
        let path = format!("/proc/{}/fd/{}", std::process::id(), pod.as_fd().as_raw_fd());
        ip(&format!("link set inner netns {path}"));
        assert_eq!(ends(&pod, &node).expect("listed").veths, [outer]);
        // The pair that stayed on the node is nobody's; a device of another kind is named.
        pod.run(|| {
            let status =
                std::process::Command::new("ip").args(["link", "add", "lonely", "up", "type", "bridge"]).status();
            assert!(status.expect("start ip").success());
        })
        .expect("enter");
        assert_eq!(ends(&pod, &node).expect("listed"), Ends { veths: vec![outer], others: vec!["lonely".to_owned()] });
    }

    /// A pod that may make devices makes a pair of its own with the indices of another pod's pair.
    #[test]
    fn a_pair_with_the_indices_of_another_pods_is_not_taken_for_it() {
        let (victim, attacker, node) = (new_netns(), new_netns(), new_netns());
        let ip = |there: &NetnsHandle, words: &str| {
            let status = there.run(|| std::process::Command::new("ip").args(words.split(' ')).status());
            assert!(status.expect("enter").expect("start ip").success(), "{words}");
        };
        let path = |of: &NetnsHandle| format!("/proc/{}/fd/{}", std::process::id(), of.as_fd().as_raw_fd());
        ip(&node, "link add outer index 70 type veth peer name inner index 60");
        ip(&node, &format!("link set inner netns {}", path(&victim)));
        assert_eq!(ends(&victim, &node).expect("listed").veths, [70]);
        ip(&attacker, "link add fake index 60 type veth peer name other index 70");
        let devices = Route::open(&attacker).expect("opened").devices().expect("listed");
        assert!(devices.iter().any(|device| (device.index, device.link) == (60, 70)), "{devices:?}");
        assert_eq!(ends(&attacker, &node).expect("listed").veths, [0; 0]);
    }

    /// Before Linux 6.6 all filters stand in one row, and others have theirs there.
    #[test]
    fn a_filter_leaves_those_of_others_where_they_are() {
        const LOOPBACK: u32 = 1;
        let (passing, first, second) = (program(0), program(2), program(2));
        let there = new_netns();
        let mut route = Route::open(&there).expect("opened");
        let (of_others, ours) = (1, HANDLE);
        assert!(route.set_filter(LOOPBACK, of_others, passing.as_fd()).expect("set"), "the first filter of the device");
        let theirs = route.filter_at(LOOPBACK, of_others).expect("asked").expect("there");
        assert!(!route.set_ingress(LOOPBACK, first.as_fd()).expect("set"), "the place was there");
        let before = route.ingress(LOOPBACK).expect("asked");
        route.set_ingress(LOOPBACK, second.as_fd()).expect("replaced");
        assert!(before.is_some() && route.ingress(LOOPBACK).expect("asked") != before, "over our own");
        assert_eq!(route.filter_at(LOOPBACK, of_others).expect("asked"), Some(theirs));
        // The kernel lists them as it asks them.
        let listed =
            there.run(|| std::process::Command::new("tc").args(["filter", "show", "dev", "lo", "ingress"]).output());
        let listed = String::from_utf8(listed.expect("enter").expect("start tc").stdout).expect("text");
        let place = |handle: u32| {
            listed.find(&format!("handle {handle:#x} ")).unwrap_or_else(|| panic!("{handle:#x}: {listed}"))
        };
        assert!(place(ours) < place(of_others), "{listed}");
        route.remove_ingress(LOOPBACK).expect("removed");
        assert_eq!(route.ingress(LOOPBACK).expect("asked"), None);
        route.remove_place(LOOPBACK).expect("left alone");
        assert_eq!(route.filter_at(LOOPBACK, of_others).expect("asked"), Some(theirs));
    }

    /// What is not there before a pod is in the mesh is not there after it.
    #[test]
    fn the_place_for_filters_goes_with_the_last_of_them() {
        const LOOPBACK: u32 = 1;
        let (there, ours) = (new_netns(), program(2));
        let mut route = Route::open(&there).expect("opened");
        let shown = || {
            let shown = there.run(|| std::process::Command::new("tc").args(["qdisc", "show", "dev", "lo"]).output());
            String::from_utf8(shown.expect("enter").expect("start tc").stdout).expect("text")
        };
        let before = shown();
        assert!(route.set_ingress(LOOPBACK, ours.as_fd()).expect("set") && shown().contains("clsact"), "{}", shown());
        route.remove_place(LOOPBACK).expect("left alone");
        assert!(route.ingress(LOOPBACK).expect("asked").is_some(), "it has a filter");
        route.remove_ingress(LOOPBACK).expect("removed");
        for _ in 0..2 {
            route.remove_place(LOOPBACK).expect("removed");
            assert_eq!(shown(), before);
        }
    }
}
