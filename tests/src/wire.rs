//! The link between the nodes as the kernel sees it: how many packets of each port cross it, its losses, and its cut.
//!
//! A recording ([`crate::capture`]) is bounded, and an application's benchmark fills it in a second. The counters here
//! are nftables' own, on both nodes, and miss nothing: a port of an application at 0 and the tunnel's above it is the
//! proof that all of it was tunnelled.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::command;
use crate::sandbox::{LINK, Node, Place, Sandbox};

/// Port of the tunnel (HBONE).
pub const TUNNEL: u16 = 15008;

/// Counters of what arrives from the link, on both nodes; they stay as long as the sandbox does.
#[derive(Debug)]
pub struct Wire {
    nodes: Vec<Place>,
    ports: Vec<u16>,
}

impl Wire {
    /// Counts packets from and to each of `ports`, and of the tunnel's, from now on.
    ///
    /// # Errors
    /// nftables refused.
    pub fn count(sandbox: &Sandbox, ports: &[u16]) -> Result<Self> {
        let mut ports = ports.to_vec();
        ports.push(TUNNEL);
        let (mut counters, mut rules) = (String::new(), String::new());
        for port in &ports {
            writeln!(counters, "counter port-{port} {{ }}")?;
            writeln!(rules, "iifname {LINK} tcp dport {port} counter name port-{port}")?;
            writeln!(rules, "iifname {LINK} tcp sport {port} counter name port-{port}")?;
        }
        let table = format!(
            "table inet culvert-wire {{\n{counters}chain arrive {{\ntype filter hook prerouting priority -400\n{rules}}}\n}}\n"
        );
        let nodes: Vec<Place> = Node::ALL.iter().map(|&node| sandbox.node_place(node).clone()).collect();
        for place in &nodes {
            nft(place, &["-f", "-"], Some(&table))?;
        }
        Ok(Self { nodes, ports })
    }

    /// Packets so far of each port, both directions together.
    ///
    /// # Errors
    /// nftables would not tell.
    pub fn read(&self) -> Result<BTreeMap<u16, u64>> {
        let mut sums = BTreeMap::new();
        for place in &self.nodes {
            let counters = counters(place, "culvert-wire")?;
            for port in &self.ports {
                let count = counters.get(&format!("port-{port}")).context("a counter that was made")?;
                *sums.entry(*port).or_default() += count;
            }
        }
        Ok(sums)
    }

    /// Fails unless packets of the tunnel have crossed, and none of the other ports.
    ///
    /// # Errors
    /// Something was not tunnelled, or nothing was sent.
    pub fn expect_tunnelled(&self) -> Result<()> {
        let read = self.read()?;
        ensure!(read.get(&TUNNEL).is_some_and(|&n| n > 0), "no packet of the tunnel crossed the link: {read:?}");
        let beside: Vec<_> = read.iter().filter(|&(&port, &n)| port != TUNNEL && n > 0).collect();
        ensure!(beside.is_empty(), "packets crossed the link outside the tunnel, by port: {beside:?}");
        Ok(())
    }
}

/// Packets that the plan's loss has dropped on arrival, and those that it saw, on both nodes together.
///
/// # Errors
/// nftables would not tell.
pub fn losses(sandbox: &Sandbox) -> Result<(u64, u64)> {
    let mut sums = (0, 0);
    for node in Node::ALL {
        let counters = counters(sandbox.node_place(node), "culvert-sandbox")?;
        sums.0 += counters.get("lost").copied().unwrap_or(0);
        sums.1 += counters.get("arrived").copied().unwrap_or(0);
    }
    Ok(sums)
}

/// The link taken down at one end, as when its cable is pulled. It stays so until [`Cut::mend`], or until the sandbox's
/// end.
#[derive(Debug)]
pub struct Cut {
    place: Place,
    routes: String,
}

impl Cut {
    /// Takes `node`'s end of the link down: the other end loses its carrier.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn at(sandbox: &Sandbox, node: Node) -> Result<Self> {
        let place = sandbox.node_place(node).clone();
        place.inside(|| {
            let path = format!("/proc/sys/net/ipv6/conf/{LINK}/keep_addr_on_down");
            std::fs::write(&path, "1").with_context(|| format!("write {path}"))
        })?;
        // The kernel forgets the routes of a device that is down, but for those that its addresses bring.
        let mut routes = String::new();
        for family in ["-4", "-6"] {
            for line in ip(&place, &[family, "route", "show", "dev", LINK])?.lines() {
                if !line.contains("proto kernel") && !line.starts_with("fe80::") {
                    let line = line.replace(" linkdown", "").replace(" dead", "");
                    let line = line.split(" pref ").next().unwrap_or(&line);
                    writeln!(routes, "{family} route replace {line} dev {LINK}")?;
                }
            }
        }
        ensure!(!routes.is_empty(), "{LINK} of {node} has no routes");
        ip(&place, &["link", "set", LINK, "down"])?;
        Ok(Self { place, routes })
    }

    /// Puts the link and its routes back.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn mend(self) -> Result<()> {
        ip(&self.place, &["link", "set", LINK, "up"])?;
        for route in self.routes.lines() {
            ip(&self.place, &route.split_whitespace().collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

fn ip(place: &Place, arguments: &[&str]) -> Result<String> {
    let mut ip = place.command("ip")?;
    command::finish(ip.args(arguments), None)
}

fn nft(place: &Place, arguments: &[&str], input: Option<&str>) -> Result<String> {
    let mut nft = place.command("nft")?;
    command::finish(nft.args(arguments), input)
}

/// The packets of each named counter of a table.
fn counters(place: &Place, table: &str) -> Result<BTreeMap<String, u64>> {
    let said = nft(place, &["-j", "list", "counters", "table", "inet", table], None)?;
    let said: Value = serde_json::from_str(&said).context("nft's JSON")?;
    let all = said["nftables"].as_array().context("nft's JSON has no list")?;
    let counters = all.iter().filter_map(|entry| {
        let counter = entry.get("counter")?;
        Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))
    });
    Ok(counters.collect())
}
