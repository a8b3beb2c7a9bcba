//! Namespaces, links, addresses, routes, and the part of kube-proxy, made with `ip` and `nft`.
//!
//! Each pod has a /32 and a /128 and reaches everything, also pods beside it, by its node's bridge address. So every
//! packet between pods is routed by the node, and a translated cluster IP is translated back, whether or not bridged
//! packets pass through netfilter here (br_netfilter). The same holds for the source: nothing is masqueraded but a pod's
//! call to itself by its own Service, as kube-proxy does.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::place::Place;
use super::plan::{LinkPlan, Node};
use crate::command;

/// Where `ip netns` keeps names.
const NETNS: &str = "/run/netns";
/// The link's device on both nodes.
pub const LINK: &str = "link0";
/// The bridge's device on both nodes, which pods reach everything by, also each other.
pub const BRIDGE: &str = "cni0";
/// Its hardware address: the nodes' bridges are in networks of their own.
const BRIDGE_MAC: &str = "02:00:00:00:00:01";
/// Host number of the bridge's addresses in the node's pod networks.
const GATEWAY: u8 = 1;

/// Makes a network namespace that `ip netns` knows by its name, in this process: a killed owner leaves no half-run `ip`
/// that would add a name after the next owner has cleaned up.
pub(crate) fn namespace(name: &str) -> Result<()> {
    let path = Path::new(NETNS).join(name);
    fs::create_dir_all(NETNS).with_context(|| format!("create {NETNS}"))?;
    File::options().write(true).create_new(true).open(&path).with_context(|| format!("create {}", path.display()))?;
    thread::scope(|scope| {
        let made = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .with_context(|| format!("keep a network namespace at {}", path.display()))?;
            // As CNI plugins do: the addresses are ours alone, and a tentative link-local address would for a second or
            // two keep a node from asking for its neighbours, that is, from forwarding.
            set("net/ipv6/conf/all/accept_dad", "0")?;
            set("net/ipv6/conf/default/accept_dad", "0")
        });
        made.join().map_err(|_| anyhow!("the thread that makes {name} panicked"))?
    })
}

/// Removes a network namespace's name; the namespace itself goes with its last process.
pub(super) fn remove_namespace(name: &str) -> Result<()> {
    let path = Path::new(NETNS).join(name);
    match umount2(&path, MntFlags::MNT_DETACH) {
        // Not there, or not mounted: its maker was stopped half-way.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(error) => return Err(error).with_context(|| format!("unmount {}", path.display())),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Joins the two nodes by a link and gives each its bridge and its routes.
pub(super) fn nodes(places: &[Place; 2], link: LinkPlan) -> Result<()> {
    let [a, b] = places;
    ip(&format!("link add {LINK} netns {} type veth peer name {LINK} netns {}\n", a.netns, b.netns), None)?;
    for (node, place) in Node::ALL.into_iter().zip(places) {
        let other = node.other();
        let mut batch = String::new();
        writeln!(batch, "link set lo up")?;
        // An address of its own: by default it is the lowest of its ports', and pods would go on sending to the one that it
        // had before another pod came.
        writeln!(batch, "link add {BRIDGE} address {BRIDGE_MAC} type bridge forward_delay 0")?;
        writeln!(batch, "link set {LINK} mtu {}", link.mtu)?;
        if link.loss_percent > 0 {
            // What segmentation offload keeps together would also be lost together, up to 64 KiB at a time.
            writeln!(batch, "link set {LINK} gso_max_segs 1")?;
        }
        writeln!(batch, "address add {}/24 dev {LINK}", node.v4())?;
        writeln!(batch, "address add {}/64 dev {LINK} nodad", node.v6())?;
        writeln!(batch, "address add {}/24 dev {BRIDGE}", node.pod_v4(GATEWAY))?;
        writeln!(batch, "address add {}/64 dev {BRIDGE} nodad", node.pod_v6(GATEWAY))?;
        writeln!(batch, "link set {LINK} up")?;
        writeln!(batch, "link set {BRIDGE} up")?;
        writeln!(batch, "route add {}/24 via {}", other.pod_v4(0), other.v4())?;
        writeln!(batch, "route add {}/64 via {}", other.pod_v6(0), other.v6())?;
        // Only so that the node's own calls to a cluster IP have a route before they are translated.
        writeln!(batch, "route add 10.96.0.0/24 dev {BRIDGE}")?;
        writeln!(batch, "route add fd00:10:96::/64 dev {BRIDGE}")?;
        ip(&batch, Some(place))?;
        place.inside(|| {
            set("net/ipv4/ip_forward", "1")?;
            set("net/ipv6/conf/all/forwarding", "1")?;
            // Pods reach each other through the node on purpose; it must not tell them a shorter way.
            set("net/ipv4/conf/all/send_redirects", "0")?;
            set(&format!("net/ipv4/conf/{BRIDGE}/send_redirects"), "0")?;
            // One behaviour with and without br_netfilter: translation happens where packets are routed.
            for family in ["iptables", "ip6tables"] {
                let name = format!("net/bridge/bridge-nf-call-{family}");
                if Path::new("/proc/sys").join(&name).exists() {
                    set(&name, "0")?;
                }
            }
            Ok(())
        })?;
        if link.delay_ms > 0 {
            let delay = format!("{}ms", link.delay_ms);
            let mut tc = place.command("tc")?;
            tc.args(["qdisc", "add", "dev", LINK, "root", "netem", "delay", &delay]);
            command::finish(&mut tc, None)
                .context("a delay on the link needs the kernel's netem (CONFIG_NET_SCH_NETEM)")?;
        }
    }
    Ok(())
}

/// Attaches a pod to its node's bridge.
pub(super) fn pod(node: Node, node_place: &Place, place: &Place, host: u8, more: &[Ipv4Addr]) -> Result<()> {
    let (v4, v6) = (node.pod_v4(host), node.pod_v6(host));
    let outside = format!("veth{host}");
    ip(
        &format!(
            "link add {outside} type veth peer name eth0 netns {}\nlink set {outside} master {BRIDGE}\nlink set {outside} up\n",
            place.netns
        ),
        Some(node_place),
    )?;
    let more: String = more.iter().map(|address| format!("address add {address}/32 dev eth0\n")).collect();
    let (gateway4, gateway6) = (node.pod_v4(GATEWAY), node.pod_v6(GATEWAY));
    ip(
        &format!(
            "link set lo up\naddress add {v4}/32 dev eth0\naddress add {v6}/128 dev eth0 nodad\nlink set eth0 up\n\
             route add {gateway4} dev eth0 scope link\nroute add default via {gateway4}\n\
             route add {gateway6} dev eth0\nroute add default via {gateway6}\n{more}"
        ),
        Some(place),
    )
}

/// One port of a Service, translated to its endpoints.
pub(super) struct Translation {
    pub(super) cluster: (Ipv4Addr, Ipv6Addr),
    pub(super) port: u16,
    pub(super) target: u16,
    pub(super) endpoints: Vec<(Ipv4Addr, Ipv6Addr)>,
}

/// What kube-proxy does on every node for clients outside the mesh, and the link's losses.
pub(super) fn services(place: &Place, translations: &[Translation], link: LinkPlan) -> Result<()> {
    let (mut dnat, mut reject, mut hairpin) = (String::new(), String::new(), String::new());
    for t in translations {
        let (v4, v6) = t.cluster;
        if t.endpoints.is_empty() {
            writeln!(reject, "ip daddr {v4} tcp dport {} reject with tcp reset", t.port)?;
            writeln!(reject, "ip6 daddr {v6} tcp dport {} reject with tcp reset", t.port)?;
            continue;
        }
        let choose = |addresses: Vec<String>| {
            let choices: Vec<String> = addresses.iter().enumerate().map(|(i, a)| format!("{i} : {a}")).collect();
            format!("numgen random mod {} map {{ {} }}", addresses.len(), choices.join(", "))
        };
        let v4s = choose(t.endpoints.iter().map(|e| e.0.to_string()).collect());
        let v6s = choose(t.endpoints.iter().map(|e| e.1.to_string()).collect());
        writeln!(dnat, "ip daddr {v4} tcp dport {} dnat ip to {v4s} : {}", t.port, t.target)?;
        writeln!(dnat, "ip6 daddr {v6} tcp dport {} dnat ip6 to {v6s} : {}", t.port, t.target)?;
        for (e4, e6) in &t.endpoints {
            writeln!(hairpin, "ip saddr {e4} ip daddr {e4} masquerade")?;
            writeln!(hairpin, "ip6 saddr {e6} ip6 daddr {e6} masquerade")?;
        }
    }
    let loss = match link.loss_percent {
        0 => String::new(),
        percent => format!(
            "iifname {LINK} counter name arrived; iifname {LINK} numgen random mod 100 < {percent} counter name lost drop;"
        ),
    };
    let rules = format!(
        "table inet culvert-sandbox {{
           counter arrived {{ }}
           counter lost {{ }}
           chain arrive {{ type nat hook prerouting priority dstnat; {dnat} }}
           chain leave {{ type nat hook output priority -100; {dnat} }}
           chain hairpin {{ type nat hook postrouting priority srcnat; {hairpin} }}
           chain loss {{ type filter hook prerouting priority raw; {loss} }}
           chain forward {{ type filter hook forward priority filter; {reject} }}
           chain output {{ type filter hook output priority filter; icmpv6 type nd-redirect drop; {reject} }}
         }}
         "
    );
    let mut nft = place.command("nft")?;
    nft.args(["-f", "-"]);
    command::finish(&mut nft, Some(&rules)).with_context(|| format!("translate cluster IPs in {}", place.netns))?;
    Ok(())
}

fn ip(batch: &str, place: Option<&Place>) -> Result<()> {
    let mut ip = match place {
        Some(place) => place.command("ip")?,
        None => std::process::Command::new("ip"),
    };
    ip.args(["-batch", "-"]);
    command::finish(&mut ip, Some(batch)).with_context(|| format!("ip commands:\n{batch}"))?;
    Ok(())
}

/// Writes a setting of the network namespace that the calling thread is in.
fn set(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).with_context(|| format!("write {value} to {path}"))
}
