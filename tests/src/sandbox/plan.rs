//! What a sandbox consists of: plain values, from which names, addresses, cgroups and manifests are derived.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

/// A sandbox name for a test of this process: the same test may run in another checkout at the same time.
pub fn own_name(test: &str) -> String {
    format!("t-{test}-{}", std::process::id())
}

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// Its cgroups are laid out as systemd does it, with containerd's names.
    A,
    /// Its cgroups are laid out as the cgroupfs driver does it.
    B,
}

impl Node {
    /// Both nodes.
    pub const ALL: [Self; 2] = [Self::A, Self::B];
    /// The region of both, as their labels say.
    pub const REGION: &'static str = "sandbox";

    /// Its zone, as its labels say.
    pub fn zone(self) -> &'static str {
        match self {
            Self::A => "sandbox-1",
            Self::B => "sandbox-2",
        }
    }

    /// Its name in Kubernetes, and the name of its directory in the cgroup tree.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "node-a",
            Self::B => "node-b",
        }
    }

    /// One letter, for file names.
    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    /// Its address on the link between the nodes.
    pub fn v4(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, self.number())
    }

    /// Its IPv6 address on the link between the nodes.
    pub fn v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, self.number().into())
    }

    /// Address `host` of the node's pod network, a /24.
    pub fn pod_v4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number(), host)
    }

    /// Address `host` of the node's pod network, a /64.
    pub fn pod_v6(self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, self.number().into(), 0, 0, 0, host.into())
    }

    /// The other node.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A pod to build.
#[derive(Debug, Clone)]
pub struct PodPlan {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Where it runs.
    pub node: Node,
    /// Labels besides `app`, which is the name.
    pub labels: BTreeMap<String, String>,
    /// Its containers' programs: arguments of `culvert-pod`.
    pub programs: Vec<Vec<String>>,
    /// The port that the kubelet probes, if any.
    pub probe: Option<u16>,
    /// IPv4 addresses besides its own.
    pub more_addresses: u8,
}

impl PodPlan {
    /// A pod that only pauses; its service account and its label `app` are its name.
    pub fn new(node: Node, namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node,
            labels: BTreeMap::new(),
            programs: Vec::new(),
            probe: None,
            more_addresses: 0,
        }
    }

    /// With a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// With a container that runs a program of `culvert-pod`.
    #[must_use]
    pub fn program(mut self, arguments: &[&str]) -> Self {
        self.programs.push(arguments.iter().map(|&a| a.to_owned()).collect());
        self
    }

    /// With an HTTP server on `ports`, named like the pod.
    #[must_use]
    pub fn http(self, ports: &[u16]) -> Self {
        let name = self.name.clone();
        let mut arguments = vec!["http-serve".to_owned(), "--name".to_owned(), name];
        arguments.extend(ports.iter().map(|p| format!("--port={p}")));
        let mut pod = self;
        pod.programs.push(arguments);
        pod
    }

    /// Probed by the kubelet on `port`.
    #[must_use]
    pub fn probed(mut self, port: u16) -> Self {
        self.probe = Some(port);
        self
    }

    /// With further IPv4 addresses, from the end of its node's network: each a destination of its own. At most one pod of
    /// a node has them.
    #[must_use]
    pub fn more_addresses(mut self, count: u8) -> Self {
        self.more_addresses = count;
        self
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// A Service of type ClusterIP, both families; its endpoints are the pods whose label `app` is its name.
#[derive(Debug, Clone)]
pub struct ServicePlan {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Port name, service port, target port.
    pub ports: Vec<(String, u16, u16)>,
}

impl ServicePlan {
    /// A Service whose target ports are its ports.
    pub fn new(namespace: &str, name: &str, ports: &[(&str, u16)]) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ports: ports.iter().map(|&(name, port)| (name.to_owned(), port, port)).collect(),
        }
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Where agents have the cluster's objects from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A folder of manifests that they watch.
    Folder,
    /// A real API server on node a.
    Api,
}

/// Properties of the link between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkPlan {
    /// MTU, bytes.
    pub mtu: u32,
    /// Share of packets that each node drops on arrival from the link, percent.
    pub loss_percent: u8,
    /// One-way delay, milliseconds; needs the kernel's netem.
    pub delay_ms: u32,
}

impl Default for LinkPlan {
    fn default() -> Self {
        Self { mtu: 1500, loss_percent: 0, delay_ms: 0 }
    }
}

/// Everything a sandbox consists of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name of this sandbox: two sandboxes at once need two names.
    pub instance: String,
    /// Namespaces with their labels.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Pods, besides the agents' own.
    pub pods: Vec<PodPlan>,
    /// Services.
    pub services: Vec<ServicePlan>,
    /// The link between the nodes.
    pub link: LinkPlan,
    /// Where agents have all of it from. It is known before the first pod is built: an API server chooses the pods' UIDs, and a
    /// pod's control group is named for its UID.
    pub source: Source,
}

impl Plan {
    /// Two nodes without pods; the system's namespaces, and `default` and `test`, which are enrolled.
    pub fn empty(instance: &str) -> Self {
        let ambient = || BTreeMap::from([("istio.io/dataplane-mode".to_owned(), "ambient".to_owned())]);
        Self {
            instance: instance.to_owned(),
            namespaces: BTreeMap::from([
                ("default".to_owned(), ambient()),
                ("istio-system".to_owned(), BTreeMap::new()),
                ("kube-system".to_owned(), BTreeMap::new()),
                ("test".to_owned(), ambient()),
            ]),
            pods: Vec::new(),
            services: Vec::new(),
            link: LinkPlan::default(),
            source: Source::Folder,
        }
    }

    /// The user's scenario: Nginx and Legacy-app (out of the mesh) on node a, Productpage behind a Service on node b, and
    /// a partner on each node for calls that stay on it.
    pub fn bookinfo(instance: &str) -> Self {
        let mut plan = Self::empty(instance);
        plan.pods = vec![
            PodPlan::new(Node::A, "test", "nginx").http(&[8080]).probed(8080),
            PodPlan::new(Node::A, "test", "legacy-app")
                .label("istio.io/dataplane-mode", "none")
                .http(&[8080])
                .probed(8080),
            PodPlan::new(Node::A, "default", "ratings").http(&[9080]).probed(9080),
            PodPlan::new(Node::B, "default", "productpage").http(&[9080, 9090]).probed(9080),
            PodPlan::new(Node::B, "default", "details").http(&[9080]).probed(9080),
        ];
        plan.services = vec![
            ServicePlan::new("default", "productpage", &[("http", 9080), ("metrics", 9090)]),
            ServicePlan::new("default", "details", &[("http", 9080)]),
            ServicePlan::new("default", "ratings", &[("http", 9080)]),
            ServicePlan::new("test", "legacy-app", &[("http", 8080)]),
            ServicePlan::new("test", "nginx", &[("http", 8080)]),
        ];
        plan
    }

    /// With agents that have the cluster's objects from there.
    #[must_use]
    pub fn source(mut self, source: Source) -> Self {
        self.source = source;
        self
    }

    /// With one more pod.
    #[must_use]
    pub fn pod(mut self, pod: PodPlan) -> Self {
        self.pods.push(pod);
        self
    }

    /// With one more Service.
    #[must_use]
    pub fn service(mut self, service: ServicePlan) -> Self {
        self.services.push(service);
        self
    }

    /// The prefix of every name on the machine: `culvert-<instance>`.
    pub fn prefix(&self) -> String {
        format!("culvert-{}", self.instance)
    }

    /// An identifier in the form of a UUID, the same for the same thing of the same sandbox.
    pub(crate) fn uid(&self, of: &str) -> String {
        let hex = self.digits(of, 2);
        format!("{}-{}-4{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
    }

    /// A container's identifier: 64 hexadecimal digits.
    pub(crate) fn container_id(&self, of: &str) -> String {
        self.digits(of, 4)
    }

    /// `words` times 16 hexadecimal digits that depend on the sandbox's name and on `of` (FNV-1a, 64 bit, salted).
    fn digits(&self, of: &str, words: u8) -> String {
        (0..words)
            .map(|salt| {
                let text = [&[salt], self.instance.as_bytes(), b"\0", of.as_bytes()].concat();
                let hash = text.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
                });
                format!("{hash:016x}")
            })
            .collect()
    }

    pub(crate) fn cluster_v4(&self, index: usize) -> Result<Ipv4Addr> {
        Ok(Ipv4Addr::new(10, 96, 0, host(index)?))
    }

    pub(crate) fn cluster_v6(&self, index: usize) -> Result<Ipv6Addr> {
        Ok(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host(index)?.into()))
    }

    /// Refuses what could not be built, before anything is changed.
    pub(crate) fn check(&self) -> Result<()> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.instance.is_empty() || self.instance.len() > 32 || !self.instance.chars().all(fits) {
            bail!("sandbox name {:?}: use 1 to 32 of a-z, 0-9 and -", self.instance);
        }
        for (index, pod) in self.pods.iter().enumerate() {
            if !self.namespaces.contains_key(&pod.namespace) {
                bail!("pod {}: its namespace is not in the plan", pod.key());
            }
            // The network namespace is named for the pod alone, so that it is easy to type.
            let taken = self.pods[..index].iter().any(|p| p.name == pod.name);
            if taken || Node::ALL.iter().any(|n| n.name() == pod.name) {
                bail!("pod {}: its name is taken, and a network namespace is named for it", pod.key());
            }
        }
        if self.source == Source::Api
            && let Some(pod) = self.pods.iter().find(|pod| pod.more_addresses > 0)
        {
            bail!("pod {}: an API server knows one address of each family", pod.key());
        }
        if self.link.loss_percent > 100 {
            bail!("link: a loss of {} percent", self.link.loss_percent);
        }
        Ok(())
    }
}

/// Number of a pod or service within its network: the first is 10.
pub(crate) fn host(index: usize) -> Result<u8> {
    match u8::try_from(index + 10) {
        Ok(host) if host < 255 => Ok(host),
        _ => bail!("more than 245 pods on a node, or services"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_have_the_form_of_a_uuid_and_differ_between_sandboxes() {
        let uid = Plan::empty("x").uid("pod/a/b");
        let lengths: Vec<usize> = uid.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert!(uid.chars().all(|c| c == '-' || c.is_ascii_hexdigit()));
        assert_ne!(uid, Plan::empty("y").uid("pod/a/b"));
        assert_eq!(Plan::empty("x").container_id("c").len(), 64);
    }

    #[test]
    fn impossible_plans_are_refused() {
        assert!(Plan::empty("a/b").check().is_err());
        assert!(Plan::empty("").check().is_err());
        assert!(Plan::empty("x").pod(PodPlan::new(Node::A, "nowhere", "p")).check().is_err());
        let twice = PodPlan::new(Node::A, "test", "p");
        assert!(Plan::empty("x").pod(twice.clone()).pod(twice).check().is_err());
        let many = Plan::empty("x").pod(PodPlan::new(Node::A, "test", "p").more_addresses(2));
        assert!(many.check().is_ok() && many.source(Source::Api).check().is_err());
        assert!(Plan::bookinfo("x").check().is_ok());
    }
}
